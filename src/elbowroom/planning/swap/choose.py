"""Chooses which storages leave: those with the longest gaps, as few as the budget allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import SavedStorage, StepProfile
from elbowroom.core.units import format_bytes
from elbowroom.planning.swap.memory import (
    StepMemory,
    choice_intervals,
    floor_bytes,
    floor_choices,
    peak_bytes,
)
from elbowroom.plans.swap import Choice, PlannedStorage, SwapPlan, default_order


def plan_swap(profile: StepProfile, budget_bytes: int) -> SwapPlan:
    """Plan a step that holds at most ``budget_bytes``, the static ones included.

    Everything is swapped at once; then storages are kept, the shortest gaps first, as long as the
    exact peak fits. Raises MemoryPlanError if not even the smallest peak does.
    """
    floor = floor_bytes(profile)
    if floor > budget_bytes:
        raise MemoryPlanError(
            f"the step needs {format_bytes(floor)} ({floor} bytes) with all that can leave "
            f"swapped at once, the budget has {format_bytes(budget_bytes)} ({budget_bytes}): raise "
            "it, or make the batch smaller"
        )
    chosen: dict[int, Choice] = {choice.storage: choice for choice in floor_choices(profile)}
    memory = StepMemory(profile, chosen)
    for storage in sorted((profile.storages[number] for number in chosen), key=_gap_ticks):
        intervals = choice_intervals(profile, storage, None)
        if memory.fits(intervals, budget_bytes):
            memory.add(intervals)
            del chosen[storage.number]
    return make_plan(profile, chosen.values(), budget_bytes)


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


def _gap_ticks(storage: SavedStorage) -> int:
    """Ticks between the last pack and the first use; one that is never used gains most."""
    if storage.use_tick is None:
        return 1 << 62
    return storage.use_tick - max(tick for tick in storage.pack_ticks if tick < storage.use_tick)
