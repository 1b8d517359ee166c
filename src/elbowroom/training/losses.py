"""Losses of a training run: a line now and then, and the first and the last of them at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

_EVERY_SECONDS = 5.0
_MEAN_OF = 20


class LossLog:
    """Losses and the pace of a run so far; ``num_samples`` are the rows that were fed."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.num_samples = 0
        self._begin = self._last = time.perf_counter()

    def note(self, num_done: int, loss: float | None, num_samples: int) -> str:
        """Note a step, the ``num_done``-th; its loss is None where that is not known.

        Returns a line to print, every few seconds; an empty one in between.
        """
        self.num_samples += num_samples
        if loss is None:
            return ""
        self.losses.append(loss)
        now = time.perf_counter()
        if now - self._last < _EVERY_SECONDS:
            return ""
        self._last = now
        rate = self.num_samples / (now - self._begin)
        return f"step {num_done}: loss {_mean(self.losses[-_MEAN_OF:])}, {rate:.1f} samples/s"

    @property
    def ends(self) -> str:
        """A line with the first and the last losses; empty where none is known."""
        if not self.losses:
            return ""
        first, last = self.losses[:_MEAN_OF], self.losses[-_MEAN_OF:]
        return f"loss: {_mean(first)} at first, {_mean(last)} at last"


def _mean(losses: Sequence[float]) -> str:
    return f"{sum(losses) / len(losses):.4f} (mean of {len(losses)})"
