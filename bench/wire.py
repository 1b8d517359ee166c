"""An emulated wire that several flows pass in fair turns, and a slow tier that lies behind one."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque

from elbowroom.swap.tier import MemoryTier, Slot

CHUNK_SECONDS = 0.002
"""How long a chunk holds a wire: short beside a copy."""

WINDOW = 4
"""Chunks that each flow asks for ahead, so that the wire is not idle while a thread wakes up.

A flow on two wires is ahead on the faster one by as much: of copies of 0.2 s beside it, 2 % are
hidden that way, and twice as much with chunks that are twice as long.
"""


class Wire:
    """One thread that lets chunks pass, first come first served, each for as long as it takes."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._queue: queue.SimpleQueue[tuple[float, float, threading.Event] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.passed_bytes = 0.0

    @property
    def chunk_bytes(self) -> float:
        return CHUNK_SECONDS * self._bytes_per_second

    def ask(self, num_bytes: float) -> threading.Event:
        """Have a chunk pass. Returns the event that is set when it has."""
        passed = threading.Event()
        self._queue.put((time.perf_counter(), num_bytes, passed))
        return passed

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        free_at = 0.0
        while (chunk := self._queue.get()) is not None:
            asked_at, num_bytes, passed = chunk
            free_at = max(free_at, asked_at) + num_bytes / self._bytes_per_second
            time.sleep(max(0.0, free_at - time.perf_counter()))
            self.passed_bytes += num_bytes
            passed.set()


class WireTier(MemoryTier):
    """Memory behind a wire."""

    def __init__(self, capacity_bytes: int, wire: Wire) -> None:
        super().__init__(capacity_bytes)
        self._wire = wire

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        super().write(slot, address, num_bytes)
        pass_all(num_bytes, self._wire.chunk_bytes, {self._wire: 1})

    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        super().read(slot, address, num_bytes)
        pass_all(num_bytes, self._wire.chunk_bytes, {self._wire: 1})


def pass_all(num_bytes: float, chunk_bytes: float, wires: dict[Wire, int]) -> None:
    """Have bytes pass wires in chunks: each chunk all wires at a time, so many times each."""
    left, asked = num_bytes, deque[threading.Event]()
    while left > 0:
        size = min(chunk_bytes, left)
        asked += [wire.ask(times * size) for wire, times in wires.items()]
        left -= size
        while len(asked) > (WINDOW - 1) * len(wires):
            asked.popleft().wait()
    for event in asked:
        event.wait()
