"""The peak of a plan is the profile's base with its intervals, counted by hand here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elbowroom.core.step_profile import SavedStorage
from elbowroom.planning.swap.memory import (
    StepMemory,
    at_once,
    choice_intervals,
    floor_bytes,
    floor_choices,
    peak_bytes,
)
from elbowroom.plans.swap import Swapped
from tests.planning.swap.profiles import two_storages

BASE = [0, 100, 100, 160, 60, 60, 0, 0, 60, 70, 10, 10, 110, 10]


def held(*choices: Swapped) -> list[int]:
    return StepMemory(two_storages(), {c.storage: c for c in choices}).held.tolist()


def test_all_at_once_is_the_profile_itself() -> None:
    assert held(Swapped(0, 0, 3), Swapped(1, 1, 2)) == BASE
    assert floor_bytes(two_storages()) == 1160
    assert floor_choices(two_storages()) == tuple(map(at_once, two_storages().storages))


def test_what_is_kept_is_held_from_its_release_to_its_return() -> None:
    assert held() == [0, 100, 100, 160, 160, 160, 160, 160, 160, 170, 110, 110, 110, 10]
    assert peak_bytes(two_storages(), ()) == 1170


def test_a_late_drop_ends_at_its_tick_and_an_early_bring_begins_there() -> None:
    late = [0, 100, 100, 160, 160, 60, 0, 0, 60, 70, 10, 10, 110, 10]
    assert held(Swapped(0, 1, 3), Swapped(1, 1, 2)) == late
    early = [0, 100, 100, 160, 60, 60, 0, 100, 160, 170, 110, 110, 110, 10]
    assert held(Swapped(0, 0, 2), Swapped(1, 1, 2)) == early
    # At one tick, drops come before what is asked for on demand.
    both = [0, 100, 100, 160, 160, 160, 100, 0, 60, 70, 10, 10, 110, 10]
    assert held(Swapped(0, 2, 3), Swapped(1, 1, 2)) == both


@pytest.mark.parametrize("free", [None, 12])
def test_what_somebody_else_holds_has_a_second_copy_unless_it_is_kept(free: int | None) -> None:
    profile = two_storages()
    first = replace(profile.storages[0], free=free)
    assert first.is_held_elsewhere
    profile = replace(profile, storages=(first, profile.storages[1]))
    deltas = list(profile.deltas)
    deltas[3] = 0  # the first does not go
    profile = replace(profile, deltas=tuple(deltas))
    kept, swapped = (peak_bytes(profile, choices) for choices in ((), [at_once(first)]))
    assert (kept, swapped) == (1170, 1210)
    assert [choice.storage for choice in floor_choices(profile)] == [1]


def test_what_is_never_used_is_held_until_its_graph_goes() -> None:
    profile = two_storages()
    unused = SavedStorage(0, 100, "", (0,), (), free=3, bring=None, release=8)
    profile = replace(profile, storages=(unused, profile.storages[1]))
    (interval,) = choice_intervals(profile, unused, None)
    assert interval == (4, 9, 100)
    assert not choice_intervals(profile, unused, at_once(unused))


def test_choices_can_be_changed_one_by_one() -> None:
    profile = two_storages()
    memory = StepMemory(profile, {0: at_once(profile.storages[0])})
    intervals = choice_intervals(profile, profile.storages[0], None)
    assert not memory.fits(intervals, 1169)
    assert memory.fits(intervals, 1170)
    memory.add(intervals)
    assert memory.held.tolist() == held()
    memory.take(intervals)
    assert memory.held.tolist() == held(at_once(profile.storages[0]))
