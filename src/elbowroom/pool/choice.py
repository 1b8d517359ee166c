"""Chooses for every iteration whether borrowed layers are streamed or rows are shipped."""

from __future__ import annotations

from typing import Literal

HYSTERESIS = 1.25
"""A batch must be so many times beyond the threshold to change the mode."""

LEAST_ITERATIONS = 20
"""Between two changes of the mode."""

MOST_CORRECTION = 4.0
"""What is measured moves the plan's threshold by no more than this factor."""

_LEARNING_RATE = 0.1

BatchMode = Literal["stream", "ship"]


class Chooser:
    """The mode of one replica's iterations, by the rows in them. Replicas choose for themselves.

    The plan gives B_th, the smallest batch that streams no slower than it ships. What streaming
    really costs (the seconds that compute waited for weights) and what a shipped row does (round
    trips, less what the layers would take here) corrects it: the threshold moves to where both
    cost the same, at most by ``MOST_CORRECTION``.

    Args:
        threshold_rows: B_th of the plan; 0 never ships.
        most_rows: the largest batch that can be shipped.

    """

    def __init__(self, threshold_rows: int, most_rows: int) -> None:
        self._planned = threshold_rows
        self._most_rows = most_rows
        self._mode: BatchMode | None = None
        self._since = 0
        self._wait_seconds: float | None = None
        self._row_seconds: float | None = None

    @property
    def threshold_rows(self) -> float:
        """B_th as corrected. Never so high that a batch which just fits switches to and fro."""
        threshold = float(self._planned)
        if self._wait_seconds and self._row_seconds is not None:
            measured = self._wait_seconds / max(self._row_seconds, 1e-9)
            least, most = threshold / MOST_CORRECTION, threshold * MOST_CORRECTION
            threshold = (threshold * min(max(measured, least), most)) ** 0.5
        return min(threshold, self._most_rows / HYSTERESIS)

    def choose(self, num_rows: int) -> BatchMode:
        """The mode of the next iteration. A batch that cannot be shipped streams at once."""
        threshold = self.threshold_rows
        wanted = self._mode or ("ship" if num_rows < threshold else "stream")
        if num_rows > self._most_rows:
            wanted = "stream"
        elif self._since >= LEAST_ITERATIONS:
            if num_rows < threshold / HYSTERESIS:
                wanted = "ship"
            elif num_rows > threshold * HYSTERESIS:
                wanted = "stream"
        self._since = 1 if wanted != self._mode else self._since + 1
        self._mode = wanted
        return wanted

    def streamed(self, wait_seconds: float) -> None:
        """An iteration streamed, and compute waited for so long."""
        self._wait_seconds = _moved(self._wait_seconds, wait_seconds)

    def shipped(self, num_rows: int, extra_seconds: float) -> None:
        """An iteration shipped, and took so much longer than with all layers here."""
        self._row_seconds = _moved(self._row_seconds, max(0.0, extra_seconds) / num_rows)


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + _LEARNING_RATE * (value - average)
