"""The choice of a swap plan for a byte budget: the fastest step found that fits.

Plans are searched at fixed budgets between the floor and keeping all, from below, each search from
the result of the one before. A budget gets the best plan of those at or below it, and TFLMS's own
for it if that is faster: more memory never gives a slower step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import format_bytes
from elbowroom.planning.swap.clock import StepClock, Timing
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.room import StepRoom
from elbowroom.planning.swap.search import SwapSearch, is_better
from elbowroom.planning.swap.settle import Settled, Settler
from elbowroom.planning.swap.thresholds import Autotune, rule_choices
from elbowroom.planning.swap.timeline import DISK_LINK, SwapLink
from elbowroom.plans.swap import Choice, PlannedStorage, Swapped, SwapPlan, default_order

_RUNGS = 24
"""Budgets at which plans are searched, between the floor and keeping all."""


def plan_swap(profile: StepProfile, budget_bytes: int, link: SwapLink = DISK_LINK) -> SwapPlan:
    """Plan a step that never holds more than ``budget_bytes``, static bytes included.

    Raises MemoryPlanError, by numbers, if nothing fits.
    """
    check_budget(profile, budget_bytes)
    clock = StepClock(profile, link)
    if peak_bytes(profile, ()) <= budget_bytes:
        return _plan(profile, {}, clock.time({}), budget_bytes)
    room = StepRoom(profile)
    autotune = Autotune(room)
    best = _best_of_rungs(room, clock, autotune, budget_bytes)
    rule = _by_rule(profile, clock, autotune, budget_bytes)
    if rule is not None and (best is None or is_better(rule, best)):
        best = rule
    assert best is not None, "all at once fits the first budget of all, the floor"
    return _plan(profile, best.choices, best.timing, budget_bytes)


def plan_thresholds(
    profile: StepProfile, budget_bytes: int, link: SwapLink = DISK_LINK
) -> SwapPlan:
    """The plan of TFLMS's autotune. Raises MemoryPlanError if nothing fits."""
    check_budget(profile, budget_bytes)
    clock = StepClock(profile, link)
    best = _by_rule(profile, clock, Autotune(StepRoom(profile)), budget_bytes)
    if best is None:
        raise MemoryPlanError(_too_small(profile, budget_bytes))
    return _plan(profile, best.choices, best.timing, budget_bytes)


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


def _best_of_rungs(
    room: StepRoom, clock: StepClock, autotune: Autotune, budget_bytes: int
) -> Settled | None:
    """The best of the plans at fixed budgets up to this one; None if there are none.

    A plan that is faster at a larger budget, but holds less than that of a smaller one, is left
    out: predicted peaks rise with the budget, as seconds fall.
    """
    profile, search = room.profile, SwapSearch(Settler(room, clock))
    best: Settled | None = None
    best_peak = 0
    for rung in rung_budgets(profile):
        if rung > budget_bytes:
            break
        rule = _by_rule(profile, clock, autotune, rung)
        most_bytes = rung - profile.static_bytes
        starts = [search.longest_first(most_bytes)]
        if best is not None:
            starts.append(search.longest_first(most_bytes, best.choices))
        if rule is not None:
            starts.append(search.longest_first(most_bytes, rule.choices))
        found = search.best(most_bytes, starts)
        if found is None or (rule is not None and is_better(rule, found)):
            found = rule
        if found is None:
            continue
        peak = peak_bytes(profile, found.choices.values())
        if best is None or (is_better(found, best) and peak >= best_peak):
            best, best_peak = found, peak
    return best


def rung_budgets(profile: StepProfile) -> list[int]:
    """Budgets in equal steps from the floor, which is the first, to below keeping all."""
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    return [floor + (keep_all - floor) * rung // _RUNGS for rung in range(_RUNGS)]


def _plan(
    profile: StepProfile, choices: Mapping[int, Swapped], timing: Timing, budget_bytes: int
) -> SwapPlan:
    plan = make_plan(profile, choices.values(), budget_bytes)
    return replace(plan, transfers=timing.transfers, seconds=timing.seconds)


def make_plan(
    profile: StepProfile, choices: Iterable[Choice], budget_bytes: int | None = None
) -> SwapPlan:
    """The plan for choices already made, with transfers in the order in which they are asked for.

    Its seconds are those of a step that never waits.
    """
    ordered = tuple(sorted(choices, key=lambda choice: choice.storage))
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
        seconds=profile.compute_seconds,
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
