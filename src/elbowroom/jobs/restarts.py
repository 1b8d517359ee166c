"""Policy for when a replica that died is started again, and when it is given up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 600.0
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 30.0


class RestartPolicy:
    """Restart policy of one replica: at most ``max_restarts`` in ten minutes, ever longer pauses.

    A death while the replica held suspect rows was to be expected, and does not count. But a
    replica that dies more than ``max_restarts`` times and finishes no row in between is itself to
    blame.
    """

    def __init__(self, max_restarts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_restarts = max_restarts
        self._clock = clock
        self._deaths: deque[float] = deque()
        self._num_in_a_row = 0

    def finished_row(self) -> None:
        self._num_in_a_row = 0

    def excuse(self) -> None:
        """Forget the last death that counted, because a row was found that kills replicas."""
        if self._deaths:
            self._deaths.pop()

    def died(self, among_suspects: bool) -> float | None:
        """Seconds until the replica is to be started again; None when it is given up."""
        now = self._clock()
        self._num_in_a_row += 1
        if not among_suspects:
            self._deaths.append(now)
        while self._deaths and self._deaths[0] <= now - WINDOW_SECONDS:
            self._deaths.popleft()
        if max(len(self._deaths), self._num_in_a_row) > self.max_restarts:
            return None
        return min(_FIRST_DELAY_SECONDS * 2.0 ** (self._num_in_a_row - 1), _LONGEST_DELAY_SECONDS)
