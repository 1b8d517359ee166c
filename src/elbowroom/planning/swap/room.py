"""The states of a step's memory, joined where no choice tells them apart, for a fast search.

A log has an entry for every allocation, while drops and brings happen at ticks only. States between
two places where a choice begins or ends to hold memory are one *span* here, with the most that is
held in any of them. Peaks are the same as those of ``memory``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from elbowroom.core.step_profile import SavedStorage, StepProfile
from elbowroom.planning.swap.memory import (
    StepMemory,
    floor_choices,
    kept_intervals,
)


@dataclass(frozen=True)
class Movable:
    """A storage whose swapping frees memory: kept, it is held on the spans ``first`` to ``end``-1.

    ``use`` is one past the last tick if the backward never asks for it.
    """

    number: int
    num_bytes: int
    pack: int
    use: int
    is_used: bool
    first: int
    end: int


class SwappedArrays(NamedTuple):
    """Choices for all movable storages at once, in the order of ``StepRoom.movable``.

    ``drops`` and ``brings`` (ticks) count where ``is_swapped``.
    """

    is_swapped: npt.NDArray[np.bool_]
    drops: npt.NDArray[np.int64]
    brings: npt.NDArray[np.int64]


class Lots(NamedTuple):
    """The fields of all movable storages, as arrays."""

    sizes: npt.NDArray[np.int64]
    packs: npt.NDArray[np.int64]
    uses: npt.NDArray[np.int64]
    is_used: npt.NDArray[np.bool_]
    firsts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class StepRoom:
    """What a step holds in each span when all that can leave is away, and what can.

    A choice adds to ``base`` (bytes): keeping, on all spans of the storage; swapping, on those
    before a late drop and from an early bring on. ``tick_spans[k]`` is the first span after tick
    k's own entry; one more entry ends the last span.
    """

    def __init__(self, profile: StepProfile) -> None:
        self.profile = profile
        intervals = {
            storage.number: kept_intervals(profile, storage)
            for storage in profile.storages
            if not storage.is_held_elsewhere
        }
        ticks = [position + 1 for position in profile.tick_positions]
        ends = [place for each in intervals.values() for one in each for place in one[:2]]
        starts = sorted({0, *ticks, *(place for place in ends if place < profile.num_states)})
        memory = StepMemory(profile, {choice.storage: choice for choice in floor_choices(profile)})
        self.base: npt.NDArray[np.int64] = np.maximum.reduceat(memory.held, starts)
        span_of = {place: span for span, place in enumerate([*starts, profile.num_states])}
        self.tick_spans = [*(span_of[place] for place in ticks), len(starts)]
        self.movable = {
            number: self._movable(profile.storages[number], span_of[one.first], span_of[one.end])
            for number, each in intervals.items()
            for one in each
            if one.first < one.end
        }

        fields = [
            (each.num_bytes, each.pack, each.use, each.is_used, each.first, each.end)
            for each in self.movable.values()
        ]
        table = np.array(fields, dtype=np.int64).reshape(-1, 6).T
        sizes, packs, uses, is_used, first_spans, end_spans = table
        self.lots = Lots(sizes, packs, uses, is_used != 0, first_spans, end_spans)

    def kept_all(self) -> npt.NDArray[np.int64]:
        """Bytes held in each span when everything is kept."""
        held = self.base.copy()
        for each in self.movable.values():
            held[each.first : each.end] += each.num_bytes
        return held

    def peak_bytes(self, choices: SwappedArrays) -> int:
        """Most bytes held in any span, without the static ones."""
        lots, spans = self.lots, np.array(self.tick_spans)
        is_late = choices.is_swapped & (choices.drops > lots.packs)
        dropped = np.where(is_late, np.maximum(lots.firsts, spans[choices.drops]), lots.firsts)
        dropped = np.where(choices.is_swapped, dropped, lots.ends)
        is_early = choices.is_swapped & lots.is_used & (choices.brings < lots.uses)
        brought = np.where(is_early, np.minimum(lots.ends, spans[choices.brings]), lots.ends)
        changes = np.zeros(len(self.base) + 1, dtype=np.int64)
        for places, sign in ((lots.firsts, 1), (dropped, -1), (brought, 1), (lots.ends, -1)):
            np.add.at(changes, places, sign * lots.sizes)
        return int((self.base + np.cumsum(changes[:-1])).max())

    def last_tick_before(self, span: int) -> int:
        """The last tick after whose entry no span before ``span`` has gone; -1 if there is none."""
        return bisect_right(self.tick_spans, span) - 1

    def _movable(self, storage: SavedStorage, first: int, end: int) -> Movable:
        is_used = storage.use_tick is not None
        use = self.profile.num_ticks if storage.use_tick is None else storage.use_tick
        pack = storage.pack_tick
        return Movable(storage.number, storage.num_bytes, pack, use, is_used, first, end)
