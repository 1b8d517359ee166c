"""Index arithmetic of one dimension that several workers share: parts, windows, and what moves.

``n`` rows on ``q`` parts: part r owns rows ``r*n//q`` to ``(r+1)*n//q``. What a part needs of the
others' rows follows from global sizes alone, so each worker computes it for all, and nothing has to
be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

PADDING = -1
"""Stands for a row of constants among rows of a tensor."""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
ResizeMode = Literal["nearest", "nearest-exact", "linear"]


class Interval(NamedTuple):
    """Rows from ``start`` to before ``stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


NOTHING = Interval(0, 0)


def bounds(size: int, parts: int) -> tuple[int, ...]:
    """The first row of each of ``parts`` parts of ``size`` rows, and the end of the last.

    Parts differ by one row at most; with fewer rows than parts, some are empty.
    """
    return tuple(part * size // parts for part in range(parts + 1))


def part_of(size: int, parts: int, index: int) -> Interval:
    return Interval(index * size // parts, (index + 1) * size // parts)


@dataclass(frozen=True)
class Window:
    """A convolution's or a pooling's window along one dimension.

    Args:
        kernel: rows that it reads.
        stride: rows from one window to the next.
        before: rows of padding before the first row.
        behind: rows of padding behind the last row.
        dilation: distance between the rows that it reads.
        ceil_mode: whether a last window may overhang, as in torch's poolings.
        mode: what stands in the padding.

    """

    kernel: int
    stride: int = 1
    before: int = 0
    behind: int = 0
    dilation: int = 1
    ceil_mode: bool = False
    mode: PaddingMode = "zeros"

    @property
    def reach(self) -> int:
        """Rows from a window's first to behind its last."""
        return self.dilation * (self.kernel - 1) + 1

    def num_outputs(self, size: int) -> int:
        """Windows over ``size`` rows."""
        room = size + self.before + self.behind - self.reach
        if not self.ceil_mode:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        begins_inside = (count - 1) * self.stride < size + self.before
        return count if begins_inside else count - 1

    def rows(self, outputs: Interval, size: int) -> tuple[int, ...]:
        """The input's rows that ``outputs`` read, in their order; PADDING for constants."""
        if not outputs.size:
            return ()
        start = outputs.start * self.stride - self.before
        stop = (outputs.stop - 1) * self.stride - self.before + self.reach
        return tuple(_real_row(row, size, self.mode) for row in range(start, stop))


@dataclass(frozen=True)
class TransposedWindow:
    """A transposed convolution's window along one dimension; arguments as in torch."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    output_padding: int = 0

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def num_outputs(self, size: int) -> int:
        return (size - 1) * self.stride - 2 * self.padding + self.reach + self.output_padding

    def rows(self, outputs: Interval, size: int) -> tuple[int, ...]:
        """The input's rows from the first to the last that reach ``outputs``; there may be none."""
        if not outputs.size:
            return ()
        first = -((self.reach - 1 - outputs.start - self.padding) // self.stride)
        behind = (outputs.stop - 1 + self.padding) // self.stride + 1
        return tuple(range(max(0, first), min(size, behind)))


class Taps(NamedTuple):
    """For each output of a resize its two rows, and the second one's share."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    share: tuple[float, ...]


@dataclass(frozen=True)
class Resize:
    """An interpolation along one dimension, to ``outputs`` rows.

    ``scale`` is input rows per output row: ``1 / scale_factor`` where a factor was given and not
    recomputed, else ``size / outputs``. ``aligned`` is torch's ``align_corners``. Rows are those
    that torch takes: it finds the nearest in single precision whatever the tensor's type, and
    copies rows, or takes each twice, where the numbers of rows say so and not the scale.
    """

    outputs: int
    scale: float
    mode: ResizeMode = "nearest"
    aligned: bool = False

    def num_outputs(self, size: int) -> int:
        return self.outputs

    def taps(self, outputs: Interval, size: int) -> Taps:
        if self.mode != "linear":
            rows = tuple(self._nearest(place, size) for place in range(*outputs))
            return Taps(rows, rows, (0.0,) * len(rows))
        exact = [self._exact(place, size) for place in range(*outputs)]
        low = tuple(min(math.floor(row), size - 1) for row in exact)
        high = tuple(min(row + 1, size - 1) for row in low)
        share = tuple(min(row - floor, 1.0) for row, floor in zip(exact, low, strict=True))
        return Taps(low, high, share)

    def rows(self, outputs: Interval, size: int) -> tuple[int, ...]:
        """The input's rows from the first to the last that ``outputs`` read."""
        if not outputs.size:
            return ()
        taps = self.taps(outputs, size)
        return tuple(range(min(taps.low), max(taps.high) + 1))

    def _nearest(self, place: int, size: int) -> int:
        if self.mode == "nearest" and self.outputs in (size, 2 * size):
            return place * size // self.outputs
        shift = 0.5 if self.mode == "nearest-exact" else 0.0
        row = np.float32(place + shift) * np.float32(self.scale)
        return min(math.floor(row), size - 1)

    def _exact(self, place: int, size: int) -> float:
        if self.outputs == size:
            return place
        if self.aligned:
            return place * ((size - 1) / (self.outputs - 1)) if self.outputs > 1 else 0.0
        return max((place + 0.5) * self.scale - 0.5, 0.0)


AxisWindow = Window | TransposedWindow | Resize


@dataclass(frozen=True)
class Exchange:
    """Which rows each part owns, and which it takes from which, along one dimension.

    Part t owns ``own[t]``, and computes the rows ``outputs[t]`` of the result. For them it reads
    ``rows[t]``, in that order, PADDING for constants; ``wanted[t]`` are the same rows, each once
    and without PADDING, as sorted intervals.
    """

    own: tuple[Interval, ...]
    outputs: tuple[Interval, ...]
    rows: tuple[tuple[int, ...], ...]
    wanted: tuple[tuple[Interval, ...], ...]

    @property
    def is_local(self) -> bool:
        """Whether every part wants all of its own rows, and no others: then none is fetched."""
        return all(
            wanted == ((own,) if own.size else ())
            for wanted, own in zip(self.wanted, self.own, strict=True)
        )

    @property
    def moves(self) -> bool:
        """Whether any part takes rows of another."""
        parts = range(len(self.own))
        return any(self.taken(giver, taker) for giver in parts for taker in parts if giver != taker)

    def taken(self, giver: int, taker: int) -> tuple[Interval, ...]:
        """Rows that part ``taker`` takes from part ``giver``, in global numbers."""
        own = self.own[giver]
        found = [Interval(max(a, own.start), min(b, own.stop)) for a, b in self.wanted[taker]]
        return tuple(each for each in found if each.size > 0)

    def num_wanted(self, part: int) -> int:
        """Rows that a part reads, each once, its own ones included."""
        return sum(each.size for each in self.wanted[part])

    def positions(self, part: int) -> tuple[int, ...]:
        """For each row that a part reads its place among those it wanted; PADDING stays."""
        place: dict[int, int] = {}
        for each in self.wanted[part]:
            for row in range(*each):
                place[row] = len(place)
        return tuple(PADDING if row == PADDING else place[row] for row in self.rows[part])


@lru_cache(maxsize=4096)
def exchange(window: AxisWindow, size: int, parts: int) -> Exchange:
    """What moves so that each of ``parts`` parts can compute its share of a window's outputs."""
    outputs = [part_of(window.num_outputs(size), parts, part) for part in range(parts)]
    rows = tuple(window.rows(each, size) for each in outputs)
    own = tuple(part_of(size, parts, part) for part in range(parts))
    return Exchange(own, tuple(outputs), rows, tuple(intervals(each) for each in rows))


def intervals(rows: Sequence[int]) -> tuple[Interval, ...]:
    """Rows, each once and without PADDING, as sorted intervals that do not touch."""
    found: list[Interval] = []
    for row in sorted({*rows} - {PADDING}):
        if found and found[-1].stop == row:
            found[-1] = Interval(found[-1].start, row + 1)
        else:
            found.append(Interval(row, row + 1))
    return tuple(found)


def _real_row(row: int, size: int, mode: PaddingMode) -> int:
    if 0 <= row < size:
        return row
    if mode == "replicate":
        return min(max(row, 0), size - 1)
    if mode == "circular":
        return row % size
    if mode == "reflect":
        row = abs(row)
        return 2 * (size - 1) - row if row >= size else row
    return PADDING
