"""The choice of a swap plan for a byte budget: the fastest step found that fits.

Plans are searched at fixed budgets between the floor and keeping all, from below, each search from
the result of the one before. A budget gets the best plan of those at or below it, so more memory
never gives a slower step. Each search is done without recomputing and, where that waits for copies,
for some of the sets of storages to recompute. A budget gets TFLMS's own plan if that is faster,
which between two of the fixed budgets need not be as fast for a little more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import format_bytes
from elbowroom.planning.swap.clock import StepClock, Timing
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.recompute import recompute_sets, recomputed, with_recomputed
from elbowroom.planning.swap.room import StepRoom
from elbowroom.planning.swap.search import SwapSearch, is_better
from elbowroom.planning.swap.settle import Settled, Settler
from elbowroom.planning.swap.thresholds import Autotune, rule_choices
from elbowroom.planning.swap.timeline import DISK_LINK, SwapLink
from elbowroom.plans.swap import Choice, PlannedStorage, Recomputed, SwapPlan, default_order

_MOST_RUNGS, _FEWEST_RUNGS, _STORAGES_SEARCHED = 64, 24, 6000
"""Budgets at which plans are searched; fewer for steps that save many storages, for the time."""

_STORAGES_RECOMPUTED = 150
"""Storages from which on only some budgets are searched with recompute, for the time: at twice as
many every second one."""

_DENSITY = 1.5
"""Power by which these budgets lie denser near the floor, where a byte saves the most time."""


def plan_swap(
    profile: StepProfile,
    budget_bytes: int,
    link: SwapLink = DISK_LINK,
    *,
    recompute: bool = True,
) -> SwapPlan:
    """Plan a step that never holds more than ``budget_bytes``, static bytes included.

    ``recompute=False`` makes no storage again. Raises MemoryPlanError, by numbers, if nothing fits.
    """
    return SwapPlanner(profile, link, recompute=recompute).plan(budget_bytes)


class SwapPlanner:
    """Plans for any budgets of one profile and link; what one budget needed serves the next."""

    def __init__(
        self, profile: StepProfile, link: SwapLink = DISK_LINK, *, recompute: bool = True
    ) -> None:
        """``recompute=False`` leaves recipes alone."""
        self._profile = profile
        sets = recompute_sets(profile) if recompute else [frozenset[int]()]
        self._variants = [_Variant(profile, numbers, link) for numbers in sets]
        self._rungs = rung_budgets(profile, len(self._plain.room.movable))
        self._stride = max(1, len(self._plain.room.movable) // _STORAGES_RECOMPUTED)
        self._found: list[_Found] = []
        """The best plan up to each budget searched so far."""

    @property
    def _plain(self) -> _Variant:
        """The step in which nothing is recomputed."""
        return self._variants[0]

    def plan(self, budget_bytes: int) -> SwapPlan:
        """The plan for a budget, as ``plan_swap`` makes it. Raises what it raises."""
        check_budget(self._profile, budget_bytes)
        plain = self._plain
        if peak_bytes(self._profile, ()) <= budget_bytes:
            return _plan(self._profile, [], plain.clock.time({}), budget_bytes)
        num_rungs = bisect_right(self._rungs, budget_bytes)
        while len(self._found) < num_rungs:
            self._found.append(self._search_rung(self._rungs[len(self._found)]))
        best = self._found[num_rungs - 1]
        rule = plain.by_rule(budget_bytes)
        if rule is not None and is_better(rule, best.settled):
            best = self._as_found(plain, rule)
        choices = best.variant.choices(best.settled)
        return _plan(self._profile, choices, best.settled.timing, budget_bytes)

    def _search_rung(self, rung: int) -> _Found:
        """Find the best plan up to the next budget.

        A plan that is faster than one for less memory, but holds less, is left out: predicted peaks
        rise with the budget, as seconds fall.
        """
        rule = self._plain.by_rule(rung)
        begins = [self._found[-1].settled.choices] if self._found else []
        settled = self._plain.best(rung, begins if rule is None else [*begins, rule.choices])
        assert settled is not None, "all at once fits the floor, the first of the budgets"
        if rule is not None and is_better(rule, settled):
            settled = rule
        found = self._as_found(self._plain, settled)
        if settled.timing.waited and len(self._found) % self._stride == 0:
            found = self._with_recompute(rung, found, begins)
        if self._found:
            best = self._found[-1]
            if not is_better(found.settled, best.settled) or found.peak_bytes < best.peak_bytes:
                return best
        return found

    def _with_recompute(
        self, rung: int, found: _Found, begins: Sequence[Collection[int]]
    ) -> _Found:
        """The best of some variants, if one is better than what was found."""
        best, settled = None, found.settled
        for variant in self._near_variants():
            sketch = variant.sketch(rung, begins)
            if sketch is not None and is_better(sketch, settled):
                best, settled = variant, sketch
        return found if best is None else self._as_found(best, best.improved(rung, settled))

    def _near_variants(self) -> list[_Variant]:
        """Sets to recompute, at most one size from the last that was best; all at the first."""
        if not self._found:
            return self._variants[1:]
        at = self._variants.index(self._found[-1].variant)
        return self._variants[max(1, at - 1) : at + 2]

    def _as_found(self, variant: _Variant, settled: Settled) -> _Found:
        return _Found(variant, settled, peak_bytes(self._profile, variant.choices(settled)))


class _Variant:
    """The step with one set of storages recomputed, in which the others are planned."""

    def __init__(self, profile: StepProfile, numbers: frozenset[int], link: SwapLink) -> None:
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

    @cached_property
    def _autotune(self) -> Autotune:
        return Autotune(self.room)

    def by_rule(self, budget_bytes: int) -> Settled | None:
        """What TFLMS's autotune finds."""
        return _by_rule(self._profile, self.clock, self._autotune, budget_bytes)

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

    def _starts(self, most_bytes: int, begins: Sequence[Collection[int]]) -> list[set[int]]:
        """Sets to begin with, each with more until the rest fits."""
        movable = self.room.movable
        sets = [(), *([number for number in begin if number in movable] for begin in begins)]
        return [self._search.longest_first(most_bytes, begin) for begin in sets]

    def choices(self, settled: Settled) -> list[Choice]:
        """The choices of all storages that are not kept."""
        return [*settled.choices.values(), *self._recomputed]


class _Found(NamedTuple):
    """The best plan up to a budget, and its peak, static bytes included."""

    variant: _Variant
    settled: Settled
    peak_bytes: int


def plan_thresholds(
    profile: StepProfile, budget_bytes: int, link: SwapLink = DISK_LINK
) -> SwapPlan:
    """The plan of TFLMS's autotune. Raises MemoryPlanError if nothing fits."""
    check_budget(profile, budget_bytes)
    clock = StepClock(profile, link)
    best = _by_rule(profile, clock, Autotune(StepRoom(profile)), budget_bytes)
    if best is None:
        raise MemoryPlanError(_too_small(profile, budget_bytes))
    return _plan(profile, best.choices.values(), best.timing, budget_bytes)


def check_budget(profile: StepProfile, budget_bytes: int) -> None:
    """Raise MemoryPlanError if not even swapping everything at once fits a budget."""
    if budget_bytes < floor_bytes(profile):
        raise MemoryPlanError(_too_small(profile, budget_bytes))


def _too_small(profile: StepProfile, budget_bytes: int) -> str:
    """Say by how much a budget is missed, and the one change that helps."""
    floor, static = floor_bytes(profile), profile.static_bytes
    missed = (
        f"the smallest feasible budget is {format_bytes(floor)} ({floor} bytes), with everything "
        f"swapped at once; this one is {format_bytes(budget_bytes)} ({budget_bytes} bytes)"
    )
    if budget_bytes <= static:
        return (
            f"{missed}, less than the {format_bytes(static)} held before the step begins (weights, "
            "optimizer state, batch): take an optimizer with less state, or a smaller model"
        )
    times = max(1.1, ceil(10 * (floor - static) / (budget_bytes - static)) / 10)
    return (
        f"{missed}: raise it, or make the batch {times:.1f} times smaller and profile again, as "
        f"{format_bytes(floor - static)} are what the step itself needs"
    )


def _by_rule(
    profile: StepProfile, clock: StepClock, autotune: Autotune, budget_bytes: int
) -> Settled | None:
    """What TFLMS's autotune finds; its link takes transfers as they are asked for."""
    rule = autotune.rule(budget_bytes)
    if rule is None:
        return None
    choices = rule_choices(profile, rule)
    moved_bytes = sum(profile.storages[number].num_bytes for number in choices)
    return Settled(choices, clock.time(choices, by_need=False), moved_bytes)


def rung_budgets(profile: StepProfile, num_movable: int) -> list[int]:
    """Budgets from the floor, which is the first, to below keeping all."""
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    count = _STORAGES_SEARCHED // max(1, num_movable)
    count = min(_MOST_RUNGS, max(_FEWEST_RUNGS, count))
    return [floor + int((keep_all - floor) * (rung / count) ** _DENSITY) for rung in range(count)]


def _plan(
    profile: StepProfile, choices: Iterable[Choice], timing: Timing, budget_bytes: int
) -> SwapPlan:
    plan = make_plan(profile, choices, budget_bytes)
    return replace(plan, transfers=timing.transfers, seconds=timing.seconds)


def make_plan(
    profile: StepProfile, choices: Iterable[Choice], budget_bytes: int | None = None
) -> SwapPlan:
    """The plan for choices already made, with transfers in the order in which they are asked for.

    Its seconds are those of a step that never waits.
    """
    ordered = tuple(sorted(choices, key=lambda choice: choice.storage))
    remade = sum(choice.recipe.seconds for choice in ordered if isinstance(choice, Recomputed))
    storages = planned_storages(profile)
    return SwapPlan(
        num_ticks=profile.num_ticks,
        smallest_bytes=profile.smallest_bytes,
        storages=storages,
        choices=ordered,
        transfers=default_order(storages, ordered),
        budget_bytes=budget_bytes,
        static_bytes=profile.static_bytes,
        peak_bytes=peak_bytes(profile, ordered),
        compute_seconds=profile.compute_seconds,
        seconds=profile.compute_seconds + remade,
    )


def planned_storages(profile: StepProfile) -> tuple[PlannedStorage, ...]:
    """What a plan says of the profile's storages."""
    return tuple(
        PlannedStorage(storage.num_bytes, storage.pack_ticks, storage.use_tick)
        for storage in profile.storages
    )


def with_static_bytes(profile: StepProfile, static_bytes: int) -> StepProfile:
    """The same step begun with more or fewer bytes held, as when optimizer state was made."""
    return replace(profile, static_bytes=static_bytes)
