"""How a tensor lies on the workers of a grid: which box each has, and what moves between layouts.

The number of a worker is written in digits, one for each prime factor of the number of workers.
Each dimension of a tensor is given some digits, which tell the part that a worker has of it;
workers that differ in the other digits only are replicas, which have the same. A layout that keeps
a dimension's leading digits keeps its intervals nested in those before, so that as little as
possible moves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from elbowroom.core.windows import NOTHING, Interval, part_of

Box = tuple[Interval, ...]
"""An interval of each dimension of a tensor."""


def prime_factors(number: int) -> tuple[int, ...]:
    """Prime factors, the smallest first; none of 1."""
    found: list[int] = []
    factor = 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return (*found, number) if number > 1 else tuple(found)


@dataclass(frozen=True)
class Layout:
    """Parts of a tensor on workers, of whom there may be others that have nothing of it.

    Args:
        radices: the base of each digit of a worker's number, the most significant first.
        dims: for each dimension of the tensor the positions of the digits that tell its part, the
            most significant first.
        first: the first of the workers; digits count from there.

    """

    radices: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    first: int = 0

    @cached_property
    def num_workers(self) -> int:
        return math.prod(self.radices)

    @property
    def workers(self) -> range:
        """The workers that have parts."""
        return range(self.first, self.first + self.num_workers)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Parts of each dimension."""
        return tuple(self.product(positions) for positions in self.dims)

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Positions of the digits that tell parts, in order."""
        return tuple(sorted(itertools.chain(*self.dims)))

    @property
    def replicas(self) -> tuple[int, ...]:
        """Positions of the digits in which workers with the same box differ."""
        return tuple(sorted({*range(len(self.radices))} - {*self.used}))

    def product(self, positions: Iterable[int]) -> int:
        """Workers that differ in these digits only."""
        return math.prod(self.radices[position] for position in positions)

    def digits(self, worker: int) -> tuple[int, ...]:
        """Digits of a worker; zeros for one that has no part."""
        if worker not in self.workers:
            return (0,) * len(self.radices)
        worker -= self.first
        found = []
        for radix in reversed(self.radices):
            worker, digit = divmod(worker, radix)
            found.append(digit)
        return tuple(reversed(found))

    def index(self, worker: int, dim: int) -> int:
        """Which part of a dimension a worker has."""
        return self.number(worker, self.dims[dim])

    def number(self, worker: int, positions: Iterable[int]) -> int:
        """A worker's digits at some positions, read as a number."""
        digits, number = self.digits(worker), 0
        for position in positions:
            number = number * self.radices[position] + digits[position]
        return number

    def group(self, worker: int, positions: Sequence[int]) -> tuple[int, ...]:
        """Workers that differ from this one in some digits only, in the order of those digits.

        One that has no part is alone.
        """
        if worker not in self.workers:
            return (worker,)
        here = list(self.digits(worker))
        found = []
        for digits in itertools.product(*(range(self.radices[each]) for each in positions)):
            for position, digit in zip(positions, digits, strict=True):
                here[position] = digit
            number = 0
            for radix, digit in zip(self.radices, here, strict=True):
                number = number * radix + digit
            found.append(self.first + number)
        return tuple(found)

    def along(self, worker: int, dim: int) -> tuple[int, ...]:
        """Workers with the other parts of one dimension, in the order of those."""
        return self.group(worker, self.dims[dim])

    def box(self, worker: int, shape: Sequence[int]) -> Box:
        """What a worker has of a tensor of this global shape.

        One that has no part has no samples, or rows of the first dimension, and else the first
        part of each dimension.
        """
        found = [
            part_of(size, self.parts[dim], self.index(worker, dim))
            for dim, size in enumerate(shape)
        ]
        if worker not in self.workers:
            found[:1] = [NOTHING]
        return tuple(found)

    def local_shape(self, worker: int, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(interval.size for interval in self.box(worker, shape))

    def without(self, *dims: int) -> Layout:
        """The same with some dimensions whole."""
        return self.with_dims(() if dim in dims else p for dim, p in enumerate(self.dims))

    def with_dims(self, dims: Iterable[tuple[int, ...]]) -> Layout:
        """A layout on the same workers, whose dimensions have these digits."""
        return Layout(self.radices, tuple(dims), self.first)

    def allotted(self, parts: Sequence[int], before: Sequence[tuple[int, ...]] = ()) -> Layout:
        """A layout with these parts of each dimension, near to that with the digits ``before``.

        Each dimension keeps the leading digits that it can; the others are taken from what is free.
        The product of ``parts`` must divide the number of workers.
        """
        before = before or self.dims
        kept = [
            self._leading(positions, count) for positions, count in zip(before, parts, strict=True)
        ]
        free = sorted({*range(len(self.radices))} - {*itertools.chain(*kept)})
        dims = []
        for positions, count in zip(kept, parts, strict=True):
            dims.append((*positions, *self.take(free, count // self.product(positions))))
        return self.with_dims(dims)

    def take(self, free: list[int], count: int) -> tuple[int, ...]:
        """Remove from ``free`` digits of so many workers. ``count`` must divide theirs."""
        taken = []
        while count > 1:
            position = next(each for each in free if count % self.radices[each] == 0)
            free.remove(position)
            taken.append(position)
            count //= self.radices[position]
        return tuple(taken)

    def scattered(
        self, positions: Sequence[int], wanted: Sequence[int], shape: Sequence[int]
    ) -> Layout:
        """The same with more digits: first where it has less parts than ``wanted``.

        Those that are left split the largest dimension further, the batch if it suffices. A single
        number cannot be split: each worker then has it.
        """
        if not self.dims:
            return self
        dims, parts = [list(each) for each in self.dims], list(self.parts)
        for position in positions:
            radix = self.radices[position]
            finer = [d for d, count in enumerate(wanted) if count % (parts[d] * radix) == 0]
            rows = [size // count for size, count in zip(shape, parts, strict=True)]
            if finer:
                dim = finer[0]
            elif rows[0] >= radix:
                dim = 0
            else:
                dim = max(range(len(rows)), key=rows.__getitem__)
            dims[dim].append(position)
            parts[dim] *= radix
        return self.with_dims(map(tuple, dims))

    def _leading(self, positions: tuple[int, ...], count: int) -> tuple[int, ...]:
        kept: tuple[int, ...] = ()
        for position in positions:
            if count % self.product((*kept, position)):
                break
            kept = (*kept, position)
        return kept

    def __str__(self) -> str:
        return "x".join(map(str, self.parts)) or "whole"


def whole(workers: range, num_dims: int) -> Layout:
    """A layout in which each of some workers has the whole tensor."""
    return Layout(prime_factors(len(workers)), ((),) * num_dims, workers.start)


class Sent(NamedTuple):
    """Messages between workers, and the elements in them."""

    messages: int = 0
    elements: int = 0

    def plus(self, other: Sent) -> Sent:
        return Sent(self.messages + other.messages, self.elements + other.elements)


@dataclass(frozen=True, eq=False)
class Move:
    """What goes from worker to worker so that a tensor lies otherwise; ``move_between`` makes it.

    ``pieces[giver, taker]`` are the boxes that one gives to another, or keeps. A taker that is
    given the same box by several adds up what they give, in the order of ``pieces``: that of the
    summands, whoever gives them, so that replicas have the same bits.
    """

    source: Layout
    target: Layout
    shape: tuple[int, ...]
    pieces: Mapping[tuple[int, int], tuple[Box, ...]]
    is_sum: bool = False

    @cached_property
    def sent(self) -> Sent:
        """All workers' messages together; what a worker keeps is none."""
        moved = [boxes for (giver, taker), boxes in self.pieces.items() if giver != taker]
        return Sent(len(moved), sum(volume(box) for boxes in moved for box in boxes))


@lru_cache(maxsize=4096)
def move_between(
    source: Layout, target: Layout, shape: tuple[int, ...], pending: tuple[int, ...] = ()
) -> Move:
    """What moves between two layouts of a tensor.

    Workers that differ in ``pending`` digits of the source hold summands of the same box; others
    that differ in no dimension's digits hold the same. A taker takes from itself where it can.
    """
    holders: dict[tuple[Box, int], list[int]] = {}
    for worker in source.workers:
        box = source.box(worker, shape)
        if volume(box):
            holders.setdefault((box, source.number(worker, pending)), []).append(worker)
    pieces: dict[tuple[int, int], tuple[Box, ...]] = {}
    for taker in target.workers:
        wanted = target.box(taker, shape)
        for (box, _), givers in holders.items():
            common = meet(box, wanted)
            if common is not None:
                giver = taker if taker in givers else givers[taker % len(givers)]
                pieces[giver, taker] = (*pieces.get((giver, taker), ()), common)
    ordered = sorted(pieces, key=lambda pair: (source.number(pair[0], pending), pair))
    return Move(source, target, shape, {pair: pieces[pair] for pair in ordered}, bool(pending))


def volume(box: Box) -> int:
    return math.prod(interval.size for interval in box)


def meet(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None for nothing."""
    common = tuple(
        Interval(max(a.start, b.start), min(a.stop, b.stop))
        for a, b in zip(one, other, strict=True)
    )
    return common if all(interval.size > 0 for interval in common) else None
