"""PipeDream's dynamic programme: which cuts to take, and how many workers each stage gets.

Papers: arXiv 1806.03377 section 3.2 (flat), SOSP 2019 section 3.1 (levels). A component of a level
is split into stages on its units, and takes as long as its slowest stage or transfer
(``planning.pipeline.stage_cost``); the best components of a level are the units of the next.

Stages are laid from the last to the first, where the papers go from the first to the last. The best
plan is the same, but the workers behind a stage are known when it is laid, and with them the
minibatches that it keeps in flight: 1 + depth * ceil(workers behind it / replicas), which at depth
1 is ceil(workers from it on / replicas). That makes the memory limit exact.

Of plans whose seconds differ by less than a part in 10^9, the one that moves the fewest bytes over
the links of the outermost level is taken, then the one that leaves most workers idle (where they
may be), then the one whose first cut is the earliest, and so on, and at equal cuts the one with
more replicas in front. Then each unit settles its own level in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elbowroom.planning.pipeline.cuts import Floats, Integers
from elbowroom.planning.pipeline.stage_cost import StageCost
from elbowroom.plans.pipeline import Level, PipelineOptions

TIE = 1e-9
"""Relative difference of seconds up to which plans are equal: sums are rounded differently."""

_SLACK = 1e-6
"""Fraction of a unit that is ignored when work is shared out, so that rounding takes none away."""

_NEVER = 2**62
_MOST_CUTS = 1400
_WORK, _INNER_WORK = 2_000_000_000, 1_000_000_000
"""Combinations of a stage and what follows it that a search may look at: a few seconds.

On the outermost level most of them are skipped unseen (``_spans``), on inner levels none.
"""


class Group(NamedTuple):
    """Layers between two cuts on ``num_units`` units of a level, each of which has all of them.

    ``unit_behind`` is the number of workers behind each unit (``StageCost.unit_behind``).
    """

    start: int
    stop: int
    num_units: int
    unit_behind: int


class _Span(NamedTuple):
    """Stages of ``units`` units that begin at one cut and end at one of ``columns``.

    ``rests`` are the numbers of units that may lie behind them.
    """

    units: int
    rests: slice
    columns: slice

    @property
    def totals(self) -> slice:
        return slice(self.rests.start + self.units, self.rests.stop + self.units)


class _Moved(NamedTuple):
    """Fewest bytes moved behind each cut, int64 [num_units + 1, num_cuts].

    ``fewest`` leaves out the transfer over the cut itself, ``then`` includes it.
    """

    fewest: Integers
    then: Integers


class Chain(NamedTuple):
    """Groups from the first layers to the last, and the seconds of the slowest of them."""

    groups: tuple[Group, ...]
    seconds: float


def max_cuts(levels: tuple[Level, ...], options: PipelineOptions) -> int:
    """Number of cuts that can be searched in a few seconds on such a topology; at least 8.

    The outermost level takes N^2/2 stages, those below N^3/3 as each may be any part of the graph,
    and with a memory limit once for each number of workers behind.
    """
    splits = [n if options.straight else n * (n + 1) // 2 for n in (x.num_units for x in levels)]
    most = min(_MOST_CUTS, int((2 * _WORK / splits[-1]) ** 0.5))
    is_limited = options.memory_limit_bytes is not None
    num_places = min(splits[-1], prod(x.num_units for x in levels)) if is_limited else 1
    for num_splits in splits[:-1]:
        most = min(most, int((3 * _INNER_WORK / (num_splits * num_places)) ** (1 / 3)))
    return max(8, most)


@dataclass(frozen=True, eq=False)
class StageSearch(StageCost):
    """Search for the best stages between cuts.

    With ``minimised`` "memory" it looks for the least memory of a worker instead of the least time,
    up to the limit. Plans that take more than ``most_seconds`` need not be found.
    """

    minimised: Literal["seconds", "memory"] = "seconds"
    most_seconds: float = np.inf
    _tables: dict[tuple[int, int], Floats] = field(default_factory=dict, init=False)

    def best_chain(
        self, level: int, behind: int, start: int, stop: int, num_units: Iterable[int]
    ) -> Chain | None:
        """The best groups for the layers between two cuts, on one of ``num_units`` units.

        Returns None if nothing fits.
        """
        allowed = tuple(num_units)
        best = self._least(level, behind, max(allowed), start, np.array([stop]))[:, 0]
        seconds = float(best[list(allowed), start].min())
        if seconds == np.inf:
            return None
        limit = seconds * (1 + TIE)
        moved = self._fewest_bytes(level, behind, start, stop, limit, best)
        count = min(allowed, key=lambda count: (moved.fewest[count, start], count))
        groups = self._walk(level, behind, start, stop, count, limit, moved)
        return Chain(groups, seconds)

    def least_seconds(self, num_units: Iterable[int]) -> float:
        """Least seconds for all layers on one of ``num_units`` outermost units.

        Infinite if nothing fits. Least bytes of a worker's memory instead, if those are
        ``minimised``.
        """
        allowed, last = list(num_units), self.cuts.num_cuts - 1
        best = self._least(len(self.levels) - 1, 0, max(allowed), 0, np.array([last]))
        return float(best[allowed, 0, 0].min())

    def _least(
        self, level: int, behind: int, num_units: int, start: int, stops: NDArray[np.intp]
    ) -> Floats:
        """Least seconds from each cut to each stop, float [num_units + 1, len(stops), num_cuts].

        The first index is the exact number of units. ``stops`` are in ascending order.
        """
        last, count = int(stops[-1]), len(stops)
        best = np.full((num_units + 1, count, self.cuts.num_cuts), np.inf)
        then = best.copy()
        """Like ``best``, as seen by a stage in front: including the transfer over the cut."""
        then[0, np.arange(count), stops] = 0.0
        transfer = self._transfer(level)
        for row in range(last - 1, start - 1, -1):
            ahead = slice(int(np.searchsorted(stops, row, "right")), count)
            for span in self._spans(level, num_units, row, last, self.most_seconds):
                rest = then[span.rests, ahead, span.columns]
                stage = self._stage_rows(level, behind, span, row)
                through = np.maximum(stage[:, None, :], rest).min(axis=2)
                target = best[span.totals, ahead, row]
                np.minimum(target, through, out=target)
            then[1:, ahead, row] = np.maximum(best[1:, ahead, row], transfer[row])
        return best

    def _spans(
        self, level: int, num_units: int, row: int, last: int, most_seconds: float
    ) -> Iterator[_Span]:
        """Stages that begin at cut ``row``, by their units, without those that take too long.

        Even if work is shared out evenly, what lies before the cut, in the stage and behind it
        needs some least number of units, each within ``most_seconds``. Units of an inner level are
        not bounded: how long they may take depends on the caller.
        """
        replications = 1 if self.options.straight else num_units
        if level < len(self.levels) - 1:
            for units in range(1, replications + 1):
                yield _Span(units, slice(0, num_units - units + 1), slice(row + 1, last + 1))
            return
        seconds = self.cuts.seconds
        # Where nothing takes time, there is nothing to share out.
        unit_seconds = (most_seconds or np.inf) * prod(x.num_units for x in self.levels[:-1])
        fewest = max(1, ceil((seconds[last] - seconds[row]) / unit_seconds - _SLACK))
        most = num_units - max(0, ceil(seconds[row] / unit_seconds - _SLACK))
        for units in range(1, min(replications, most) + 1):
            rests = slice(max(0, fewest - units), most - units + 1)
            in_time = seconds[row + 1 : last + 1] - seconds[row] <= unit_seconds * units
            ends = np.flatnonzero(in_time & self._ends(row, last, units, rests.start))
            if len(ends) and rests.start < rests.stop:
                columns = slice(row + 1 + int(ends[0]), row + 2 + int(ends[-1]))
                yield _Span(units, rests, columns)

    def _ends(self, row: int, last: int, units: int, units_behind: int) -> NDArray[np.bool_]:
        """Mask over the cuts behind ``row``: where a stage of ``units`` units can end.

        It has ``units_behind`` units or more behind it.
        """
        columns = slice(row + 1, last + 1)
        holds = self.cuts.holds[row, columns]
        limit = self.options.memory_limit_bytes
        if limit is None or len(self.levels) > 1:
            return holds
        in_flight = self.in_flight(self.unit_behind(0, 0, units, units_behind))
        return np.asarray(holds & (self.least_bytes(row, columns, in_flight, units) <= limit))

    def _fewest_bytes(
        self, level: int, behind: int, start: int, stop: int, limit: float, best: Floats
    ) -> _Moved:
        """Fewest bytes moved by any arrangement that takes at most ``limit`` seconds.

        ``best`` is float [num_units + 1, num_cuts]: the least seconds.
        """
        num_units = len(best) - 1
        fewest = np.full((num_units + 1, self.cuts.num_cuts), _NEVER, np.int64)
        then = fewest.copy()
        then[0, stop] = 0
        transfer = self._transfer(level)
        for row in range(stop - 1, start - 1, -1):
            if best[:, row].min() > limit:
                continue
            for span in self._spans(level, num_units, row, stop, limit):
                if best[span.totals, row].min() > limit:
                    continue
                total = self._bytes_from(level, behind, span, row, then, limit)
                target = fewest[span.totals, row]
                np.minimum(target, total.min(axis=1), out=target)
            if transfer[row] <= limit:
                then[1:, row] = fewest[1:, row] + self.transfer_bytes[row]
        return _Moved(fewest, then)

    def _bytes_from(
        self, level: int, behind: int, span: _Span, row: int, then: Integers, limit: float
    ) -> Integers:
        """Bytes moved by a stage and all behind it, int64 [rests, columns]; _NEVER if too slow."""
        fits = self._stage_rows(level, behind, span, row) <= limit
        weights = self.cuts.parameter_bytes[span.columns] - self.cuts.parameter_bytes[row]
        total = then[span.rests, span.columns] + self.sync_bytes(span.units, weights)
        return np.where(fits, np.minimum(total, _NEVER), _NEVER)

    def _walk(
        self,
        level: int,
        behind: int,
        start: int,
        stop: int,
        num_units: int,
        limit: float,
        moved: _Moved,
    ) -> tuple[Group, ...]:
        """Follow the fewest bytes from the first cut; ties take the earliest cut, most replicas."""
        groups = []
        while start != stop:
            found = []
            for units in range(1, 1 + (1 if self.options.straight else num_units)):
                rest = num_units - units
                span = _Span(units, slice(rest, rest + 1), slice(start + 1, stop + 1))
                total = self._bytes_from(level, behind, span, start, moved.then, limit)
                equal = np.flatnonzero(total[0] == moved.fewest[num_units, start])
                found += [(int(equal[0]) + start + 1, -units)] if len(equal) else []
            next_cut, units = min(found)[0], -min(found)[1]
            num_units -= units
            unit_behind = self.unit_behind(level, behind, units, num_units)
            groups.append(Group(start, next_cut, units, unit_behind))
            start = next_cut
        return tuple(groups)

    def _transfer(self, level: int) -> Floats:
        seconds = self.transfer_seconds(level)
        return seconds if self.minimised == "seconds" else np.zeros_like(seconds)

    def _stage_rows(self, level: int, behind: int, span: _Span, row: int) -> Floats:
        """Seconds of the stages of a span from cut ``row``, infinite where a stage is impossible.

        Float [rests, columns], or [1, columns] if what is behind makes no difference. Bytes of a
        worker's memory instead, if those are ``minimised``.
        """
        columns, limit = span.columns, self.options.memory_limit_bytes
        is_memory = self.minimised == "memory"
        if level > 0:
            is_placed = is_memory or limit is not None
            rests = range(span.rests.start, span.rests.stop) if is_placed else ()
            places = [self.unit_behind(level, behind, span.units, rest) for rest in rests] or [0]
            of_unit = np.stack([self._table(level - 1, place)[row, columns] for place in places])
            return of_unit if is_memory else self._of_stage(level, span, row, of_unit)
        holds = self.cuts.holds[row, columns]
        units_behind = np.arange(span.rests.start, span.rests.stop)[:, None]
        in_flight = self.in_flight(-(-(behind + units_behind) // span.units))
        if is_memory:
            return np.where(holds, self.least_bytes(row, columns, in_flight, span.units), np.inf)
        held, swapped = self.worker_memory(row, columns, in_flight, span.units)
        work = np.where(holds, self.unit_seconds(row, columns, swapped), np.inf)
        seconds = self._of_stage(level, span, row, work)
        if limit is None:
            return seconds[None]
        return np.where(held <= limit, seconds, np.inf)

    def _of_stage(self, level: int, span: _Span, row: int, unit_seconds: Floats) -> Floats:
        weights = self.cuts.parameter_bytes[span.columns] - self.cuts.parameter_bytes[row]
        return self.replicated(level, unit_seconds, span.units, weights)

    def _table(self, level: int, behind: int) -> Floats:
        """Least seconds of one component of a level between any two cuts.

        Float [num_cuts, num_cuts].
        """
        if (level, behind) not in self._tables:
            num_units, size = self.levels[level].num_units, self.cuts.num_cuts
            best = self._least(level, behind, num_units, 0, np.arange(1, size))
            table = np.full((size, size), np.inf)
            table[:, 1:] = best[num_units].T
            self._tables[level, behind] = table
        return self._tables[level, behind]
