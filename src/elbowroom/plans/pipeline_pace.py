"""The pace of a pipe in simulated and real runs: seconds per minibatch while it is full."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import linear_regression


def steady_seconds(updates: Sequence[tuple[int, float]]) -> float | None:
    """Seconds per minibatch of a full pipe: the slope over the latter half of ``updates``.

    ``updates`` are the input stage's, in order: each a minibatch and the second at which the update
    with it ended. Updates after the last forward must be left out: the pipe drains then. Returns
    None if there are too few to fit a slope.
    """
    late = updates[len(updates) // 2 :]
    if len(late) < 2:
        return None
    return linear_regression(*zip(*late, strict=True)).slope
