"""Border rows that the workers of a split dimension take from each other."""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import NamedTuple

from elbowroom.core.windows import AxisWindow, Interval, Window, exchange


class Border(NamedTuple):
    """Rows that the worker with most of them takes in one direction, and messages they come in."""

    rows: float
    messages: int


NO_BORDER = Border(0, 0)


@lru_cache(maxsize=1 << 14)
def border(window: AxisWindow, size: int, parts: int) -> Border:
    """What a part inside takes for a window along one dimension of ``size`` rows.

    For convolutions and poolings the closed form, which is exact where the stride divides the
    parts: rows before by the padding, and behind by what the window reaches past its stride.
    """
    if parts == 1:
        return NO_BORDER
    if isinstance(window, Window):
        share = size / parts
        before, behind = window.before, max(0, window.reach - window.stride - window.before)
        return Border(before + behind, ceil(before / share) + ceil(behind / share))
    return _counted(window, size, parts)


def _counted(window: AxisWindow, size: int, parts: int) -> Border:
    """The same, counted over the parts."""
    plan = exchange(window, size, parts)
    rows = messages = 0
    for taker in range(parts):
        taken = [plan.taken(giver, taker) for giver in range(parts) if giver != taker]
        rows = max(rows, sum(_num_rows(each) for each in taken))
        messages = max(messages, sum(bool(each) for each in taken))
    return Border(rows, messages)


def _num_rows(intervals: tuple[Interval, ...]) -> int:
    return sum(each.size for each in intervals)
