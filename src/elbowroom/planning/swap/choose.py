"""The choice of a swap plan for a byte budget: the fastest step found that fits.

Plans are searched at fixed budgets between the floor and keeping all, from below, each search from
the result of the one before. A budget gets the best plan of those at or below it, so more memory
never gives a slower step. Each search is done without recomputing and, where that waits for copies,
for some of the sets of storages to recompute. A budget gets TFLMS's own plan if that is faster,
which between two of the fixed budgets need not be as fast for a little more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from math import ceil

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import format_bytes
from elbowroom.planning.swap.clock import StepClock, Timing
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes, tick_peaks
from elbowroom.planning.swap.room import StepRoom
from elbowroom.planning.swap.search import is_better
from elbowroom.planning.swap.settle import Settled
from elbowroom.planning.swap.thresholds import Autotune, rule_choices
from elbowroom.planning.swap.timeline import DISK_LINK, SwapLink
from elbowroom.planning.swap.variants import Candidate, Variant, VariantSearch
from elbowroom.plans.swap import Choice, PlannedStorage, Recomputed, SwapPlan, default_order

_MOST_RUNGS, _FEWEST_RUNGS, _STORAGES_SEARCHED = 64, 24, 6000
"""Budgets at which plans are searched; fewer for steps that save many storages, for the time."""

_STORAGES_RECOMPUTED = 100
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
        self._plain = Variant(profile, frozenset(), link)
        self._variants = VariantSearch(profile, link) if recompute else None
        self._autotune = Autotune(self._plain.room)
        num_movable = len(self._plain.room.movable)
        self._rungs = rung_budgets(profile, num_movable)
        self._stride = max(1, num_movable // _STORAGES_RECOMPUTED)
        self._found: list[Candidate] = []
        """The best plan up to each budget searched so far."""

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
        rule = _by_rule(self._profile, plain.clock, self._autotune, budget_bytes)
        if rule is not None and is_better(rule, best.settled):
            best = Candidate(plain, rule)
        choices = best.variant.choices(best.settled)
        return _plan(self._profile, choices, best.settled.timing, budget_bytes)

    def _search_rung(self, rung: int) -> Candidate:
        """Find the best plan up to the next budget.

        A plan that is faster than one for less memory, but holds less, is left out: predicted peaks
        rise with the budget, as seconds fall.
        """
        last = self._found[-1] if self._found else None
        begins = [] if last is None else [last.settled.choices]
        rule = _by_rule(self._profile, self._plain.clock, self._autotune, rung)
        settled = self._plain.best(rung, begins if rule is None else [*begins, rule.choices])
        assert settled is not None, "all at once fits the floor, the first of the budgets"
        if rule is not None and is_better(rule, settled):
            settled = rule
        found = Candidate(self._plain, settled)
        is_due = len(self._found) % self._stride == 0
        if self._variants is not None and is_due and settled.timing.waited:
            found = self._variants.better(rung, found, last) or found
        if last is not None:
            is_slower = not is_better(found.settled, last.settled)
            if is_slower or self._peak(found) < self._peak(last):
                return last
        return found

    def _peak(self, found: Candidate) -> int:
        return peak_bytes(self._profile, found.variant.choices(found.settled))


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
            + ("" if profile.swaps_optimizer else ", or profile with --swap-optimizer")
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
        tick_peaks=tick_peaks(profile, ordered),
        compute_seconds=profile.compute_seconds,
        seconds=profile.compute_seconds + remade,
        num_threads=profile.num_threads,
        held_gradient_bytes=profile.held_gradient_bytes,
        swaps_optimizer=profile.swaps_optimizer,
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
