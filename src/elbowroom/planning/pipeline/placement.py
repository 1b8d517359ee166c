"""Placement of a pipeline's workers in a topology of levels, and the level between any two.

The planner fills units: a component of a level takes units of it, one group of stages after the
other, and each unit of a group holds all stages of the group, which fill it (SOSP 2019). The next
replica of a stage is in the next unit of the outermost level, so minibatch i stays in one unit from
stage to stage of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline import Level


@dataclass(frozen=True)
class Placement:
    """Location of each worker: ``slots[w]`` is its number in the topology, counted unit by unit.

    Workers are numbered stage by stage; ``levels`` has the lowest level first.
    """

    levels: tuple[Level, ...]
    slots: tuple[int, ...]

    @cached_property
    def unit_workers(self) -> tuple[int, ...]:
        """Number of workers in one unit of each level; 1 at the lowest."""
        return _unit_workers(self.levels)

    def unit(self, worker: int, level: int) -> int:
        """Number of the unit of a level that a worker is in; 0 above the outermost level."""
        if level == len(self.levels):
            return 0
        return self.slots[worker] // self.unit_workers[level]

    def level_between(self, one: int, other: int) -> int:
        """The outermost level in whose units two workers differ: they talk over its links."""
        assert one != other, "a worker needs no link to itself"
        differing = (
            level
            for level in reversed(range(len(self.levels)))
            if self.unit(one, level) != self.unit(other, level)
        )
        return next(differing)


def place_workers(
    levels: tuple[Level, ...], level_replicas: Sequence[tuple[int, ...]]
) -> Placement:
    """Place the replicas of stages, whose numbers at each level are given outermost first.

    Raises InputError if the stages do not fill the units of a level, as those of a plan do.
    """
    if not levels or any(len(counts) != len(levels) for counts in level_replicas):
        raise InputError(f"stages of {level_replicas} replicas have not {len(levels)} levels")
    sizes = _unit_workers(levels)
    taken = [0] * len(levels)
    slots: list[int] = []
    for outermost_first in level_replicas:
        counts = outermost_first[::-1]
        for replica in range(prod(counts)):
            slot, rest = 0, replica
            for index in reversed(range(len(counts))):
                rest, digit = divmod(rest, counts[index])
                slot += (taken[index] + digit) * sizes[index]
            slots.append(slot)
        _take(levels, taken, counts)
    if any(taken[:-1]):
        raise InputError(f"stages of {level_replicas} replicas leave units of {levels[0]} open")
    return Placement(levels, tuple(slots))


def _take(levels: tuple[Level, ...], taken: list[int], counts: tuple[int, ...]) -> None:
    """Count the units that a stage takes; those that fill a unit of the level above take it.

    Raises InputError if the stage overfills a unit.
    """
    taken[0] += counts[0]
    for index, level in enumerate(levels[:-1]):
        if taken[index] > level.num_units:
            raise InputError(f"a stage of {counts[::-1]} replicas overfills a unit of {level}")
        if taken[index] < level.num_units:
            return
        taken[index] = 0
        taken[index + 1] += counts[index + 1]


def _unit_workers(levels: tuple[Level, ...]) -> tuple[int, ...]:
    counts = [level.num_units for level in levels]
    return tuple(prod(counts[:index]) for index in range(len(counts)))
