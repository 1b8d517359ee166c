"""Seconds of a swapped step, fast enough for a search, and the order in which its link copies.

The same times as ``timeline`` has for the same order of transfers, by a recurrence over drops,
brings, packs and uses instead of a general simulation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush, merge
from itertools import accumulate
from typing import NamedTuple

from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import Direction, Swapped, Transfer

_DROP, _BRING, _PACK, _USE, _PHASES = 0, 1, 2, 3, 4
"""Order within a tick; a drop at the first pack follows that pack."""


class Timing(NamedTuple):
    """A timed step.

    Args:
        seconds: of the step.
        waited: seconds waited for each storage's copies; hidden ones are missing.
        out_ends: second at which each storage's copy out ends.
        delays: seconds waited so far after each wait, with the tick at which it was.
        order: transfers in the link's order, as 2 x storage, + 1 for a copy in.

    """

    seconds: float
    waited: dict[int, float]
    out_ends: dict[int, float]
    delays: list[tuple[int, float]]
    order: list[int]

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Transfers in the link's order; those of two queues in the order in which they end."""
        return tuple(Transfer("in" if code % 2 else "out", code // 2) for code in self.order)


class StepClock:
    """Times choices for one profile and link."""

    def __init__(self, profile: StepProfile, link: SwapLink) -> None:
        self.profile = profile
        self._link = link
        self._begins = list(accumulate(profile.seconds, initial=profile.seconds_before))
        self._seconds: dict[Direction, list[float]] = {
            direction: [link.seconds(direction, each.num_bytes) for each in profile.storages]
            for direction in ("out", "in")
        }
        self._packs = [storage.pack_tick for storage in profile.storages]
        last = profile.num_ticks
        self._uses = [last if each.use_tick is None else each.use_tick for each in profile.storages]

    def time(self, choices: Mapping[int, Swapped], by_need: bool = True) -> Timing:
        """Time a step whose link takes, of the transfers asked for, the one needed first.

        Without ``by_need`` it takes them in the order in which they were asked for, as
        ``plans.swap.default_order`` lists them.
        """
        outs = _Queue(self._seconds["out"], self._seconds["in"])
        ins = _Queue(self._seconds["out"], self._seconds["in"]) if self._link.is_duplex else outs
        num, delay = max(1, len(self._packs)), 0.0
        waited: dict[int, float] = {}
        delays: list[tuple[int, float]] = []
        for code in self._events(choices):
            (tick, phase), number = divmod(code // num, _PHASES), code % num
            now = self._begins[tick] + delay
            choice, pack = choices[number], self._packs[number]
            if phase == _PACK:
                at_once = choice.drop == pack
                need = choice.drop * _PHASES + (_USE if at_once else _DROP)
                outs.ask(now, (need if by_need else code // num, number), 2 * number)
            elif phase == _BRING:
                use = self._uses[number]
                need = use * _PHASES + _USE
                outs_first = (need, number) if by_need else (code // num, use * num + number)
                ins.ask(now, outs_first, 2 * number + 1)
            else:
                is_in = phase == _USE and tick != pack
                wait = (ins if is_in else outs).finish(2 * number + is_in) - now
                if wait > 0:
                    delay += wait
                    waited[number] = waited.get(number, 0.0) + wait
                    delays.append((tick, delay))
        order = outs.order
        if ins is not outs:
            done = outs.done | ins.done
            order = list(merge(outs.order, ins.order, key=lambda code: done[code]))
        out_ends = {number: outs.done[2 * number] for number in choices}
        return Timing(self._begins[-1] + delay, waited, out_ends, delays, order)

    def gap(self, first: int, last: int) -> float:
        """Seconds of compute from one tick to another."""
        return self._begins[last] - self._begins[first]

    def first_tick_after(self, timing: Timing, second: float) -> int:
        """The first tick that begins at ``second`` or later; one past the last if none does."""
        low, high = 0, len(self._begins) - 1
        while low < high:
            middle = (low + high) // 2
            if self.begin_of(timing, middle) < second:
                low = middle + 1
            else:
                high = middle
        return low

    def begin_of(self, timing: Timing, tick: int) -> float:
        """The second at which the main thread comes to a tick, before what it waits for there."""
        place = bisect_left(timing.delays, (tick, 0.0))
        return self._begins[tick] + (timing.delays[place - 1][1] if place else 0.0)

    def _events(self, choices: Mapping[int, Swapped]) -> list[int]:
        """Drops, brings, packs and uses in order, each as one number: place and storage."""
        num = max(1, len(self._packs))
        events = []
        for number, choice in choices.items():
            pack = self._packs[number]
            events.append((pack * _PHASES + _PACK) * num + number)
            drop = _USE if choice.drop == pack else _DROP
            events.append((choice.drop * _PHASES + drop) * num + number)
            if choice.bring is not None:
                events.append((choice.bring * _PHASES + _BRING) * num + number)
                events.append((self._uses[number] * _PHASES + _USE) * num + number)
        events.sort()
        return events


@dataclass
class _Queue:
    """A link that makes one transfer at a time. Transfers are 2 x storage, + 1 for a copy in.

    It is brought up to date only when the main thread waits: all that it could have chosen from
    until then has been asked for by then.
    """

    out_seconds: list[float]
    in_seconds: list[float]
    now: float = 0.0
    asked: deque[tuple[float, tuple[int, int], int]] = field(default_factory=deque)
    ready: list[tuple[tuple[int, int], int]] = field(default_factory=list)
    done: dict[int, float] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def ask(self, now: float, rank: tuple[int, int], transfer: int) -> None:
        self.asked.append((now, rank, transfer))

    def finish(self, transfer: int) -> float:
        """Work until a transfer is done. Returns when that is."""
        while transfer not in self.done:
            if not self.ready:
                self.now = max(self.now, self.asked[0][0])
            while self.asked and self.asked[0][0] <= self.now:
                _, rank, other = self.asked.popleft()
                heappush(self.ready, (rank, other))
            _, taken = heappop(self.ready)
            seconds = self.in_seconds if taken % 2 else self.out_seconds
            self.now += seconds[taken // 2]
            self.done[taken] = self.now
            self.order.append(taken)
        return self.done[transfer]
