"""When to drop and when to bring: for a set of swapped storages, as late and as early as fits.

A transfer hides behind more compute the later its storage is dropped, or the sooner it is brought;
both hold memory, and both want the same room around the turn from forward to backward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from elbowroom.planning.swap.clock import StepClock, Timing
from elbowroom.planning.swap.room import Movable, StepRoom
from elbowroom.plans.swap import Swapped

Preference = Literal["drops", "brings", "trimmed"]
"""Who gets room first: late drops, early brings, or drops only as late as their copies need."""

PREFERENCES: tuple[Preference, ...] = ("trimmed", "drops", "brings")


class Settled(NamedTuple):
    """Choices that fit a budget, and the step that they give."""

    choices: dict[int, Swapped]
    timing: Timing
    moved_bytes: int


class Settler:
    """Settles sets of storages for one profile and link."""

    def __init__(self, room: StepRoom, clock: StepClock) -> None:
        self.room = room
        self.clock = clock
        self._kept = room.kept_all()

    def held_without(self, swapped: Collection[int]) -> npt.NDArray[np.int64]:
        """Bytes held in each span when ``swapped`` are dropped at once and brought on demand."""
        held = self._kept.copy()
        for number in swapped:
            each = self.room.movable[number]
            held[each.first : each.end] -= each.num_bytes
        return held

    def settle(
        self, swapped: Collection[int], most_bytes: int, preference: Preference
    ) -> Settled | None:
        """Choices for ``swapped`` that hold at most ``most_bytes`` beside the static ones.

        None if there are none.
        """
        held = self.held_without(swapped)
        if int(held.max()) > most_bytes:
            return None
        room = most_bytes - held
        by_pack = sorted((self.room.movable[number] for number in swapped), key=lambda x: x.pack)
        by_use = sorted(by_pack, key=lambda x: x.use)
        drops = {each.number: each.pack for each in by_pack}
        brings = {each.number: each.use for each in by_pack}
        if preference == "brings":
            self._bring_early(by_use, room, drops, brings)
            self._drop_late(by_pack, room, drops, brings)
        else:
            self._drop_late(by_pack, room, drops, brings)
            if preference == "trimmed":
                self._trim(by_pack, room, drops, brings)
            self._bring_early(by_use, room, drops, brings)
        choices = self._choices(by_pack, drops, brings)
        timing = self.clock.time(choices)
        return Settled(choices, timing, sum(each.num_bytes for each in by_pack))

    def _drop_late(
        self,
        by_pack: list[Movable],
        room: npt.NDArray[np.int64],
        drops: dict[int, int],
        brings: dict[int, int],
    ) -> None:
        """Drop as late as there is room, the last saved first.

        Copies leave in the order of packs: the last has waited for all others when it is done, and
        needs time the most.
        """
        for each in reversed(by_pack):
            limit = min(self.room.tick_spans[brings[each.number]], each.end)
            limit = max(each.first, limit)
            lacking = np.flatnonzero(room[each.first : limit] < each.num_bytes)
            until = each.first + int(lacking[0]) if lacking.size else limit
            drop = min(self.room.last_tick_before(until), brings[each.number])
            if drop > each.pack:
                drops[each.number] = drop
                room[each.first : max(each.first, self.room.tick_spans[drop])] -= each.num_bytes

    def _bring_early(
        self,
        by_use: list[Movable],
        room: npt.NDArray[np.int64],
        drops: dict[int, int],
        brings: dict[int, int],
    ) -> None:
        """Bring as early as there is room, the one needed first before the others."""
        for each in by_use:
            if not each.is_used:
                continue
            begin = min(each.end, max(each.first, self.room.tick_spans[drops[each.number]]))
            lacking = np.flatnonzero(room[begin : each.end] < each.num_bytes)
            since = begin + int(lacking[-1]) + 1 if lacking.size else begin
            bring = bisect_left(self.room.tick_spans, since)
            bring = max(drops[each.number], min(bring, each.use))
            if bring < each.use:
                brings[each.number] = bring
                room[self.room.tick_spans[bring] : each.end] -= each.num_bytes

    def _trim(
        self,
        by_pack: list[Movable],
        room: npt.NDArray[np.int64],
        drops: dict[int, int],
        brings: dict[int, int],
    ) -> None:
        """Drop no later than the copy's end: the room is free for brings then."""
        timing = self.clock.time(self._choices(by_pack, drops, brings))
        spans = self.room.tick_spans
        for each in by_pack:
            needed = self.clock.first_tick_after(timing, timing.out_ends[each.number])
            drop = max(each.pack, min(drops[each.number], needed))
            if drop < drops[each.number]:
                since = each.first if drop == each.pack else max(each.first, spans[drop])
                room[since : max(since, spans[drops[each.number]])] += each.num_bytes
                drops[each.number] = drop

    @staticmethod
    def _choices(
        swapped: list[Movable], drops: dict[int, int], brings: dict[int, int]
    ) -> dict[int, Swapped]:
        return {
            each.number: Swapped(
                each.number, drops[each.number], brings[each.number] if each.is_used else None
            )
            for each in swapped
        }
