"""What one swapped step did and when: compute, copies, waits, and the memory held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from elbowroom.core.trace import Span
from elbowroom.plans.swap import Transfer
from elbowroom.swap.link import Copy
from elbowroom.swap.meter import Meter, MeterLog
from elbowroom.swap.observer import StepObserver

_PROCESS = "step"


class StepTrace(StepObserver):
    """Observer of a step that keeps its times and the allocator's log.

    Run the step inside ``recording``. Tracks have the names of the simulated step's.

    Args:
        meter: the process's meter; None where there is none: then peaks are not known.

    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._log: MeterLog | None = None
        self._times: list[tuple[float, float]] = []
        """When each tick began, and when its hook returned."""
        self._marks: list[int] = []
        self._copies: list[tuple[Transfer, Copy]] = []
        self._waits: list[tuple[Transfer, float, float]] = []
        self.begin = self.end = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Log the allocator while the block runs."""
        if self._meter is not None:
            self._meter.start_log()
        self.begin = time.perf_counter()
        try:
            yield
        finally:
            self.end = time.perf_counter()
            if self._meter is not None:
                self._log = self._meter.stop_log()

    @property
    def tick_seconds(self) -> tuple[float, ...]:
        """When each tick began, by ``time.perf_counter``."""
        return tuple(begin for begin, _ in self._times)

    @property
    def tick_peaks(self) -> tuple[int, ...] | None:
        """Most bytes held before the first tick and after each, beyond those held at the begin.

        As ``SwapPlan.tick_peaks`` predicts them; None without a meter.
        """
        if self._log is None:
            return None
        held = np.concatenate(([0], np.cumsum(self._log.deltas)))
        places = (0, *self._marks, len(held) - 1)
        return tuple(int(held[first : last + 1].max()) for first, last in pairwise(places))

    def spans(self) -> Iterator[Span]:
        """Compute between ticks, copies and waits."""
        begin = self.begin
        for tick, (start, end) in enumerate((*self._times, (self.end, self.end))):
            name = f"tick {tick - 1}" if tick else "begin"
            yield Span(_PROCESS, "compute", name, begin, start)
            begin = end
        for transfer, start, end in self._waits:
            yield Span(_PROCESS, "waits", f"wait for {transfer}", start, end)
        for transfer, copy in self._copies:
            if copy.end:
                yield Span(_PROCESS, transfer.direction, str(transfer), copy.begin, copy.end)

    # What a StepObserver is told.

    def ticked(self) -> None:
        now = time.perf_counter()
        self._times.append((now, now))
        if self._meter is not None:
            self._marks.append(self._meter.mark())

    def tick_ended(self) -> None:
        self._times[-1] = (self._times[-1][0], time.perf_counter())

    def asked(self, transfer: Transfer, copy: Copy) -> None:
        self._copies.append((transfer, copy))

    def waited(self, transfer: Transfer, begin: float, end: float) -> None:
        self._waits.append((transfer, begin, end))
