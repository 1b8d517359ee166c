"""A background thread that streams borrowed layers into slots ahead of compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.slot_order import SlotOrder
from elbowroom.pool.slots import Slot, Slots

STREAM_TIMEOUT_SECONDS = 60.0
"""Seconds that compute waits for one streamed layer before it gives up."""


class Housekeeper:
    """A ``Streamer`` within a host's memory: a thread that copies as far ahead as slots allow.

    The thread carries out ``fetches`` pass after pass, from ``sources`` (uint8, by layer), each
    layer into a slot of its own choice that stays the same (``SlotOrder``). It waits
    for free slots, which the compute thread signals (``release``), and signals ready ones, which
    the compute thread waits for (``acquire``). An error ends it and is raised by ``acquire``.
    Copies are one-sided and release the interpreter lock.

    ``timeout_seconds`` is how long ``acquire`` waits. ``bytes_per_second`` holds copies back, to
    see how a pool would do on a slower link.
    """

    def __init__(
        self,
        fetches: Sequence[Fetch],
        sources: Mapping[int, torch.Tensor],
        num_slots: int,
        timeout_seconds: float = STREAM_TIMEOUT_SECONDS,
        bytes_per_second: float = float("inf"),
    ) -> None:
        self._order = SlotOrder.of(fetches, num_slots)
        self._sources = {layer: source.numpy() for layer, source in sources.items()}
        self._slots = Slots(self._order.slot_of, max(source.numel() for source in sources.values()))
        self._targets = [buffer.numpy() for buffer in self._slots.buffers]
        self._timeout_seconds = timeout_seconds
        self._thread = threading.Thread(target=self._run, name="elbowroom-pool", daemon=True)
        self._bytes_per_second = bytes_per_second
        self._is_closing = False
        self.streamed_bytes = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        return self._slots.buffers

    def buffer_of(self, layer: int) -> torch.Tensor:
        return self._slots.buffer_of(layer)

    def start(self) -> None:
        self._thread.start()

    def acquire(self, layer: int) -> Slot:
        return self._slots.wait_ready(layer, self._timeout_seconds)

    def release(self, slot: Slot) -> None:
        self._slots.release(slot)

    def restart(self) -> None:
        self._slots.restart()

    def pause(self) -> None:
        self._slots.pause()

    def resume(self) -> None:
        self._slots.resume()

    def sync(self) -> None:
        """Do nothing: there are no graphs on a host."""

    def join(self) -> None:
        """Do nothing: see ``sync``."""

    def check_integrity(self) -> None:
        self._slots.check_integrity()

    def close(self) -> None:
        """Stop after the copy under way and wait for the thread."""
        self._is_closing = True  # before the thread is woken, so that it begins no other pass
        self._slots.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._run_passes(self._slots.epoch)
        except BaseException as error:  # the compute thread raises it
            self._slots.fail(error)

    def _run_passes(self, epoch: int) -> None:
        """Carry out the fetches of forward passes, until the order starts anew."""
        filling: dict[int, Slot] = {}
        for fetch in self._order.all_passes():
            if fetch.chunk == 0:
                slot = self._slots.reserve(fetch.layer, epoch)
                if slot is None:
                    break
                filling[fetch.layer] = slot
            self._copy(fetch, filling[fetch.layer])
            if fetch.chunk == fetch.num_chunks - 1:
                self._slots.mark_ready(filling.pop(fetch.layer), epoch)
        for slot in filling.values():
            self._slots.mark_ready(slot, epoch)  # the epoch is over: this frees it

    def _copy(self, fetch: Fetch, slot: Slot) -> None:
        """Copy one chunk of a layer, as slowly as ``bytes_per_second`` says."""
        source = self._sources[fetch.layer]
        chunk_bytes = -(-source.size // fetch.num_chunks)
        part = slice(fetch.chunk * chunk_bytes, min((fetch.chunk + 1) * chunk_bytes, source.size))
        begin, num_bytes = time.perf_counter(), part.stop - part.start
        np.copyto(self._targets[slot.index][part], source[part])
        early = num_bytes / self._bytes_per_second - (time.perf_counter() - begin)
        if early > 0:
            time.sleep(early)
        self.streamed_bytes += num_bytes
