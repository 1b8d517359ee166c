"""Streaming layers into slots: what a pool asks for, and how devices with streams do it.

On a CPU, ``Housekeeper`` copies on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.slots import Slot, SlotState, check_slots


class Streamer(Protocol):
    """Brings layers into slots in the order of its plan, pass after pass, ahead of compute."""

    streamed_bytes: int

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """The slots' memory, uint8. All of it is taken when the streamer is made."""
        ...

    def start(self) -> None:
        """Begin to fetch."""
        ...

    def acquire(self, layer: int) -> Slot:
        """The slot that holds the next layer, usable by what is computed from here on.

        Raises PoolError when it does not come.
        """
        ...

    def release(self, slot: Slot) -> None:
        """What was computed so far is all that needed this layer."""
        ...

    def restart(self) -> None:
        """The next layer wanted is the first again, in the middle of a pass."""
        ...

    def pause(self) -> None:
        """Between two passes: no layer is wanted until ``resume``."""
        ...

    def resume(self) -> None: ...

    def check_integrity(self) -> None:
        """Raise PoolError if slots and layers disagree."""
        ...

    def close(self) -> None: ...


class DeviceStreamer:
    """Has the device copy beside compute: a stream per slot, and events between the two.

    The host waits for nothing. After ``acquire``, the compute stream waits for the layer's copy;
    after ``release``, the slot's next copy waits for the compute stream. In every pass the layers
    take the same slots in turn, so that a layer's weights always lie at the same address, as
    captured graphs need. A link's time is shared by all copies under way.
    """

    def __init__(
        self,
        fetches: Sequence[Fetch],
        sources: Mapping[int, torch.Tensor],
        num_slots: int,
        device: torch.device,
    ) -> None:
        slot_bytes = max(source.numel() for source in sources.values())
        self._device = torch.get_device_module(device)
        self._sources = sources
        self._layers = [fetch.layer for fetch in fetches if fetch.chunk == 0]
        self._slots = [
            Slot(index, torch.empty(slot_bytes, dtype=torch.uint8, device=device))
            for index in range(min(num_slots, len(self._layers)))
        ]
        self._copies = [self._device.Stream() for _ in self._slots]
        self._ready = [self._device.Event() for _ in self._slots]
        self._free = [self._device.Event() for _ in self._slots]
        self.streamed_bytes = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._slots]

    def start(self) -> None:
        self.restart()

    def acquire(self, layer: int) -> Slot:
        slot = self._slots[self._layers.index(layer) % len(self._slots)]
        self._ready[slot.index].wait()
        slot.state = SlotState.IN_USE
        return slot

    def release(self, slot: Slot) -> None:
        assert slot.layer is not None
        following = self._layers.index(slot.layer) + len(self._slots)
        self._fetch(slot, following if following < len(self._layers) else slot.index)

    def restart(self) -> None:
        for slot in self._slots:
            if slot.layer != self._layers[slot.index]:
                self._fetch(slot, slot.index)

    def pause(self) -> None:
        """What was fetched for the next pass stays where it is."""

    def resume(self) -> None:
        pass

    def check_integrity(self) -> None:
        check_slots(self._slots)

    def close(self) -> None:
        """Copies under way read what peers own: wait for them."""
        for stream in self._copies:
            self._device.current_stream().wait_stream(stream)
        self._device.synchronize()

    def _fetch(self, slot: Slot, position: int) -> None:
        """Copy the layer at ``position`` of the order, after all that was computed so far."""
        slot.layer = self._layers[position]
        slot.state = SlotState.FILLING
        source = self._sources[slot.layer]
        self._free[slot.index].record()
        copies = self._copies[slot.index]
        with self._device.stream(copies):
            self._free[slot.index].wait()
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            self._ready[slot.index].record()
        self.streamed_bytes += source.numel()
