"""Search for the storages to make again: for each set a step in which the others are planned.

Sets that grow by cost are tried first, then sets that differ by one storage from the best.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.clock import StepClock
from elbowroom.planning.swap.recompute import (
    neighbour_sets,
    recompute_sets,
    recomputed,
    with_recomputed,
)
from elbowroom.planning.swap.room import StepRoom
from elbowroom.planning.swap.search import SwapSearch, is_better
from elbowroom.planning.swap.settle import Settled, Settler
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import Choice

_MOST_TRIALS, _STORAGES_TRIED = 12, 1200
"""Sets beside the best that one search tries; fewer in steps that save many storages."""


class Variant:
    """The step with one set of storages recomputed; maybe none."""

    def __init__(self, profile: StepProfile, numbers: frozenset[int], link: SwapLink) -> None:
        self.numbers = numbers
        self._profile = with_recomputed(profile, numbers)
        self._recomputed = recomputed(profile, numbers)
        self._link = link

    @cached_property
    def room(self) -> StepRoom:
        return StepRoom(self._profile)

    @cached_property
    def clock(self) -> StepClock:
        return StepClock(self._profile, self._link)

    @cached_property
    def _search(self) -> SwapSearch:
        return SwapSearch(Settler(self.room, self.clock))

    def best(self, budget_bytes: int, begins: Sequence[Collection[int]]) -> Settled | None:
        """The best found from no storage and from some sets to swap; None if none fits."""
        most_bytes = budget_bytes - self._profile.static_bytes
        return self._search.best(most_bytes, self._starts(most_bytes, begins))

    def sketch(self, budget_bytes: int, begins: Sequence[Collection[int]]) -> Settled | None:
        """The same in a hurry, without local search."""
        most_bytes = budget_bytes - self._profile.static_bytes
        return self._search.sketch(most_bytes, self._starts(most_bytes, begins))

    def improved(self, budget_bytes: int, sketch: Settled) -> Settled:
        """What local search makes of a sketch."""
        return self._search.improved(budget_bytes - self._profile.static_bytes, sketch)

    def choices(self, settled: Settled) -> list[Choice]:
        """The choices of all storages that are not kept."""
        return [*settled.choices.values(), *self._recomputed]

    def _starts(self, most_bytes: int, begins: Sequence[Collection[int]]) -> list[set[int]]:
        """Sets to begin with, each with more until the rest fits."""
        movable = self.room.movable
        sets = [(), *([number for number in begin if number in movable] for begin in begins)]
        return [self._search.longest_first(most_bytes, begin) for begin in sets]


class Candidate(NamedTuple):
    """A way to take a step: what is recomputed, and what is swapped when."""

    variant: Variant
    settled: Settled


class VariantSearch:
    """Finds sets of storages to recompute for one profile and link."""

    def __init__(self, profile: StepProfile, link: SwapLink) -> None:
        self._profile = profile
        self._link = link
        self._sets = recompute_sets(profile)[1:]
        self._variants: dict[frozenset[int], Variant] = {}
        num_storages = max(1, len(profile.storages))
        self._num_trials = min(_MOST_TRIALS, _STORAGES_TRIED // num_storages)

    def better(
        self, budget_bytes: int, than: Candidate, last: Candidate | None
    ) -> Candidate | None:
        """A candidate that is better than one; None if none was found.

        ``last`` is the best for a smaller budget, near which the best of this one is looked for.
        """
        best, settled = than, than.settled
        begins = [] if last is None else [last.settled.choices]
        for numbers in self._near_sets(last):
            best = self._better(budget_bytes, numbers, best, begins)
        left, improves = self._num_trials, bool(self._sets)
        while improves and best.settled.timing.waited:
            improves = False
            for numbers in self._neighbours(best):
                if left <= 0:
                    break
                left -= 1
                found = self._better(budget_bytes, numbers, best, [best.settled.choices])
                if found is not best:
                    best, improves = found, True
                    break
        if best.settled is settled:
            return None
        return Candidate(best.variant, best.variant.improved(budget_bytes, best.settled))

    def _better(
        self,
        budget_bytes: int,
        numbers: frozenset[int],
        than: Candidate,
        begins: Sequence[Collection[int]],
    ) -> Candidate:
        """The sketch with a set recomputed if it is better than another candidate, or that one."""
        if numbers not in self._variants:
            self._variants[numbers] = Variant(self._profile, numbers, self._link)
        variant = self._variants[numbers]
        sketch = variant.sketch(budget_bytes, begins)
        if sketch is not None and is_better(sketch, than.settled):
            return Candidate(variant, sketch)
        return than

    def _near_sets(self, last: Candidate | None) -> list[frozenset[int]]:
        """What was recomputed last, and the next smaller and larger set; all at the first."""
        if last is None:
            return self._sets
        size = len(last.variant.numbers)
        smaller = [each for each in self._sets if len(each) < size][-1:]
        larger = [each for each in self._sets if len(each) > size][:1]
        return [*smaller, *([last.variant.numbers] if size else []), *larger]

    def _neighbours(self, found: Candidate) -> Iterator[frozenset[int]]:
        waited, choices = found.settled.timing.waited, found.settled.choices
        by_wait = sorted(choices, key=lambda number: (-waited.get(number, 0.0), number))
        return neighbour_sets(self._profile, found.variant.numbers, by_wait)
