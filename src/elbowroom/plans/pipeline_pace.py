"""The pace of a pipe, of simulated and real runs alike: seconds per minibatch while it is full."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import linear_regression


def steady_seconds(updates: Sequence[tuple[int, float]]) -> float | None:
    """The slope over the latter half of ``updates`` of the input stage, in their order.

    Each is a minibatch and the second at which the update with it ended, none of them after the
    last forward: the pipe drains then. None where they are too few to tell.
    """
    late = updates[len(updates) // 2 :]
    if len(late) < 2:
        return None
    return linear_regression(*zip(*late, strict=True)).slope
