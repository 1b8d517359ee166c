"""The exact peak memory of a swapped step, a linear function of its plan.

The profile's log is of a step in which every storage was swapped at once. Each choice adds (or,
where the log has two copies, takes away) the bytes of its storage on some states. States are
numbered as in ``core.step_profile``: state p is what is held after p entries of the log.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elbowroom.core.step_profile import SavedStorage, StepProfile
from elbowroom.plans.swap import Choice, Recomputed, Swapped


class Interval(NamedTuple):
    """Bytes that are held in addition on the states ``first`` to ``end`` - 1; may be negative."""

    first: int
    end: int
    num_bytes: int


def at_once(storage: SavedStorage) -> Swapped:
    """The choice that the profile was measured with: drop at the pack, bring at the first use."""
    return Swapped(storage.number, storage.pack_tick, storage.use_tick)


def choice_intervals(
    profile: StepProfile, storage: SavedStorage, choice: Choice | None
) -> tuple[Interval, ...]:
    """What a choice holds beyond the profile; None is the choice to keep the storage."""
    if choice is None:
        intervals = kept_intervals(profile, storage)
    elif isinstance(choice, Recomputed):
        intervals = recomputed_intervals(storage, choice)
    else:
        intervals = swapped_intervals(profile, storage, choice)
    return tuple(each for each in intervals if each.first < each.end)


def kept_intervals(profile: StepProfile, storage: SavedStorage) -> list[Interval]:
    """What keeping holds beyond the profile: the storage, from its natural release to its return.

    Where somebody else holds it beyond its return, the profile has two copies and keeping has one.
    """
    size, last = storage.num_bytes, profile.num_states - 1
    free = last if storage.free is None else storage.free
    release = last if storage.release is None else storage.release
    back = release if storage.bring is None else storage.bring
    if free < back:
        return [Interval(free + 1, back + 1, size)]
    if storage.bring is None:
        return []
    return [Interval(back + 1, min(free, release) + 1, -size)]


def swapped_intervals(
    profile: StepProfile, storage: SavedStorage, choice: Swapped
) -> list[Interval]:
    """What a later drop and an earlier bring hold beyond the profile."""
    intervals = []
    if storage.free is not None and choice.drop > storage.pack_tick:
        # Held until the tick's own entry; the state after it is without the storage.
        dropped = _state_after(profile, choice.drop)
        intervals.append(Interval(storage.free + 1, dropped, storage.num_bytes))
    is_early = choice.bring is not None and choice.bring != storage.use_tick
    if storage.bring is not None and is_early:
        assert choice.bring is not None
        brought = _state_after(profile, choice.bring)
        intervals.append(Interval(brought, storage.bring + 1, storage.num_bytes))
    return intervals


def recomputed_intervals(storage: SavedStorage, choice: Recomputed) -> list[Interval]:
    """What a replay holds beyond the profile, in which the storage was brought at the same place.

    It is there for the moment in which the storage is made.
    """
    if storage.bring is None:
        return []
    return [Interval(storage.bring + 1, storage.bring + 2, choice.recipe.extra_bytes)]


def _state_after(profile: StepProfile, tick: int) -> int:
    """The state after a tick's own entry; one past the last state for a tick after the step."""
    return profile.tick_positions[tick] + 1 if tick < profile.num_ticks else profile.num_states


class StepMemory:
    """Bytes held in each state of a step, without the static ones, under choices that may change.

    A search changes choices one by one: ``add`` and ``take`` cost as much as the states they touch.
    ``held`` (int64, one number for each state) is to be read only.
    """

    def __init__(self, profile: StepProfile, choices: Mapping[int, Choice | None]) -> None:
        """Storages that ``choices`` lacks are kept."""
        self.profile = profile
        changes = np.zeros(profile.num_states + 1, dtype=np.int64)
        changes[1 : profile.num_states] = profile.deltas
        for storage in profile.storages:
            for each in choice_intervals(profile, storage, choices.get(storage.number)):
                changes[each.first] += each.num_bytes
                changes[each.end] -= each.num_bytes
        self.held: npt.NDArray[np.int64] = np.cumsum(changes[:-1])

    @property
    def peak_bytes(self) -> int:
        """Most bytes held, the static ones included."""
        return self.profile.static_bytes + int(self.held.max())

    def add(self, intervals: Iterable[Interval]) -> None:
        """Hold more: the intervals of a choice that is now made."""
        for each in intervals:
            self.held[each.first : each.end] += each.num_bytes

    def take(self, intervals: Iterable[Interval]) -> None:
        """Undo ``add``."""
        for each in intervals:
            self.held[each.first : each.end] -= each.num_bytes

    def fits(self, intervals: Iterable[Interval], budget_bytes: int) -> bool:
        """Whether the intervals, which do not overlap, could be added without exceeding a budget.

        Where what is held exceeds the budget already, outside of them, this is not noticed.
        """
        room = budget_bytes - self.profile.static_bytes
        return all(
            int(self.held[each.first : each.end].max()) + each.num_bytes <= room
            for each in intervals
        )


def peak_bytes(profile: StepProfile, choices: Iterable[Choice]) -> int:
    """Predicted peak of a step under ``choices``, static bytes included; the rest is kept."""
    return StepMemory(profile, {choice.storage: choice for choice in choices}).peak_bytes


def tick_peaks(profile: StepProfile, choices: Iterable[Choice]) -> tuple[int, ...]:
    """Most bytes held before the first tick and after each, without the static ones.

    What a tick drops is still counted in the interval that it begins; what a replay holds is over
    before the next.
    """
    choice_of = {choice.storage: choice for choice in choices}
    memory, ticks = StepMemory(profile, choice_of), profile.tick_positions
    replays = [
        interval
        for choice in choice_of.values()
        if isinstance(choice, Recomputed)
        for interval in recomputed_intervals(profile.storages[choice.storage], choice)
    ]
    most_held = [int(memory.held[replay.first]) for replay in replays]
    memory.take(replays)
    places = zip((0, *ticks), (*ticks, profile.num_states - 1), strict=True)
    peaks = [int(memory.held[first : last + 1].max()) for first, last in places]
    for replay, most in zip(replays, most_held, strict=True):
        place = bisect_left(ticks, replay.first - 1)  # of the entry that brings its storage
        peaks[place] = max(peaks[place], most)
    return tuple(peaks)


def floor_choices(profile: StepProfile) -> tuple[Choice, ...]:
    """The choices with the smallest peak: all at once, but for what somebody else holds anyway."""
    return tuple(at_once(storage) for storage in profile.storages if not storage.is_held_elsewhere)


def floor_bytes(profile: StepProfile) -> int:
    """The smallest feasible budget without recompute, static bytes included."""
    return peak_bytes(profile, floor_choices(profile))
