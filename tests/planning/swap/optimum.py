"""The fastest step that fits a budget, by a mixed-integer program (scipy's HiGHS).

The optimum over what is swapped, when it is dropped and when brought, for a link that copies out in
the order of packs, then back in the order of uses. Drops are at packs or at the first unpack,
brings at unpacks: nothing happens to memory between.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.memory import Interval, choice_intervals
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.plans.swap import Swapped

Terms = dict[int, float]


class Optimum(NamedTuple):
    """The fastest step found; the choices of it; a lower bound of all; whether it is optimal."""

    seconds: float
    choices: tuple[Swapped, ...]
    bound: float
    is_closed: bool


class _Program:
    """Variables and rows ``low <= terms <= high``."""

    def __init__(self) -> None:
        self.upper: list[float] = []
        self.rows: list[tuple[Terms, float, float]] = []

    def variable(self, upper: float = np.inf) -> int:
        self.upper.append(upper)
        return len(self.upper) - 1

    def at_least(self, terms: Terms, low: float) -> None:
        self.rows.append((terms, low, np.inf))

    def equal(self, terms: Terms, value: float) -> None:
        self.rows.append((terms, value, value))

    def solve(self, cost: Terms, whole: list[int], limit_seconds: float):
        places = [
            (row, n, x) for row, (terms, *_) in enumerate(self.rows) for n, x in terms.items()
        ]
        rows, columns, values = zip(*places, strict=True)
        matrix = coo_matrix((values, (rows, columns)), (len(self.rows), len(self.upper))).tocsr()
        low, high = ([row[side] for row in self.rows] for side in (1, 2))
        costs, integrality = np.zeros(len(self.upper)), np.zeros(len(self.upper))
        for number, factor in cost.items():
            costs[number] = factor
        integrality[whole] = 1
        return milp(
            costs,
            integrality=integrality,
            bounds=Bounds(np.zeros(len(self.upper)), np.array(self.upper)),
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": limit_seconds, "mip_rel_gap": 1e-3},
        )


def optimum(
    profile: StepProfile, link: SwapLink, budget_bytes: int, limit_seconds: float = 20
) -> Optimum | None:
    """None if nothing was found in ``limit_seconds``."""
    program = _Program()
    items = [each for each in profile.storages if not each.is_held_elsewhere and each.unpack_ticks]
    packs = sorted({each.pack_tick for each in items} | {profile.num_forward_ticks})
    uses = sorted({each.unpack_ticks[0] for each in items})
    drops = {
        (each.number, tick): program.variable(1)
        for each in items
        for tick in packs
        if tick >= each.pack_tick
    }
    brings = {
        (each.number, tick): program.variable(1)
        for each in items
        for tick in uses
        if tick <= each.unpack_ticks[0]
    }
    whole = [*drops.values(), *brings.values()]
    swapped = {
        each.number: {number: 1.0 for (n, _), number in drops.items() if n == each.number}
        for each in items
    }
    for each in items:
        program.rows.append((swapped[each.number], 0, 1))
        bring = {number: -1.0 for (n, _), number in brings.items() if n == each.number}
        program.equal({**swapped[each.number], **bring}, 0)
    end = _add_times(program, profile, link, drops, brings, swapped)
    _add_memory(program, profile, budget_bytes, drops, brings)
    found = program.solve({end: 1.0}, whole, limit_seconds)
    if found.x is None:
        return None
    drop_of = {n: tick for (n, tick), number in drops.items() if found.x[number] > 0.5}
    bring_of = {n: tick for (n, tick), number in brings.items() if found.x[number] > 0.5}
    choices = tuple(Swapped(n, drop_of[n], bring_of[n]) for n in sorted(drop_of))
    return Optimum(found.fun, choices, found.mip_dual_bound, found.status == 0)


def _add_times(
    program: _Program,
    profile: StepProfile,
    link: SwapLink,
    drops: dict[tuple[int, int], int],
    brings: dict[tuple[int, int], int],
    swapped: dict[int, Terms],
) -> int:
    """Add the main thread and the link. Returns the variable of the step's end."""
    items = [profile.storages[number] for number in swapped]
    out_seconds = {x.number: link.seconds("out", x.num_bytes) for x in items}
    in_seconds = {x.number: link.seconds("in", x.num_bytes) for x in items}
    most = profile.compute_seconds + sum(out_seconds.values()) + sum(in_seconds.values())
    ticks = range(profile.num_ticks)
    arrives = [program.variable() for _ in range(profile.num_ticks + 1)]
    asks, begins = [program.variable() for _ in ticks], [program.variable() for _ in ticks]
    ends = {(way, x.number): program.variable() for way in ("out", "in") for x in items}
    program.at_least({arrives[0]: 1}, profile.seconds_before)
    for tick in ticks:
        program.at_least({asks[tick]: 1, arrives[tick]: -1}, 0)
        program.at_least({begins[tick]: 1, asks[tick]: -1}, 0)
        program.at_least({arrives[tick + 1]: 1, begins[tick]: -1}, profile.seconds[tick])

    def takes(number: int, seconds: float) -> Terms:
        return dict.fromkeys(swapped[number], -seconds)

    before: int | None = None
    for each in sorted(items, key=lambda x: (x.pack_tick, x.number)):
        done, needs = ends["out", each.number], takes(each.number, out_seconds[each.number])
        program.at_least({done: 1, asks[each.pack_tick]: -1, **needs}, 0)
        if before is not None:
            program.at_least({done: 1, before: -1, **needs}, 0)
        before = done
    before = None if link.is_duplex else before
    for each in sorted(items, key=lambda x: (x.unpack_ticks[0], x.number)):
        done, needs = ends["in", each.number], takes(each.number, in_seconds[each.number])
        if before is not None:
            program.at_least({done: 1, before: -1, **needs}, 0)
        is_late = dict.fromkeys(swapped[each.number], -most)
        program.at_least({begins[each.unpack_ticks[0]]: 1, done: -1, **is_late}, -most)
        before = done
    for (number, tick), variable in drops.items():
        waits = begins if tick == profile.storages[number].pack_tick else asks
        program.at_least({waits[tick]: 1, ends["out", number]: -1, variable: -most}, -most)
    for (number, tick), variable in brings.items():
        enough = -(in_seconds[number] + most)
        program.at_least({ends["in", number]: 1, asks[tick]: -1, variable: enough}, -most)
    return arrives[-1]


def _add_memory(
    program: _Program,
    profile: StepProfile,
    budget_bytes: int,
    drops: dict[tuple[int, int], int],
    brings: dict[tuple[int, int], int],
) -> None:
    """Add a row for each stretch of states without a change, if it can exceed the budget."""
    held = np.concatenate(([0], np.cumsum(profile.deltas))) + profile.static_bytes
    parts: list[tuple[Interval, int]] = []
    movable = {number for number, _ in drops}
    for storage in profile.storages:
        for each in choice_intervals(profile, storage, None):
            held[each.first : each.end] += each.num_bytes
            if storage.number in movable:
                parts += [
                    (each._replace(num_bytes=-each.num_bytes), variable)
                    for (number, _), variable in drops.items()
                    if number == storage.number
                ]
    for (number, tick), variable in drops.items():
        storage = profile.storages[number]
        drop_only = Swapped(number, tick, None)
        parts += [(x, variable) for x in choice_intervals(profile, storage, drop_only)]
    for (number, tick), variable in brings.items():
        storage = profile.storages[number]
        bring_only = Swapped(number, storage.pack_tick, tick)
        parts += [(x, variable) for x in choice_intervals(profile, storage, bring_only)]
    places = {place for part, _ in parts for place in (part.first, part.end)}
    cuts = sorted({0, len(held), *places})
    for first, end in pairwise(cuts):
        terms: Terms = defaultdict(float)
        for part, variable in parts:
            if part.first <= first < part.end:
                terms[variable] += part.num_bytes / 1e6
        most = (budget_bytes - int(held[first:end].max())) / 1e6
        if sum(max(0.0, factor) for factor in terms.values()) > most:
            program.rows.append((dict(terms), -np.inf, most))
