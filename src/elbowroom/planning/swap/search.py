"""Search for the storages to swap: longest gap first, then one storage more, less or exchanged."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from elbowroom.planning.swap.settle import PREFERENCES, Preference, Settled, Settler

_MOST_TRIALS, _FEWEST_TRIALS, _STORAGES_TRIED = 100, 2, 2500
"""Neighbours that one search tries; fewer of many storages, each of which takes about 20 us."""

_IS_FASTER = 1e-9
"""Fraction of the seconds by which a step must be faster to count as such."""


class SwapSearch:
    """Finds fast steps for one profile and link. Deterministic: no clock ends it."""

    def __init__(self, settler: Settler) -> None:
        self._settler = settler
        movable = settler.room.movable
        self._sizes = {number: each.num_bytes for number, each in movable.items()}
        self._gaps = {
            number: settler.clock.gap(each.pack, each.use) for number, each in movable.items()
        }
        trials = _STORAGES_TRIED // max(1, len(movable))
        self._num_trials = min(_MOST_TRIALS, max(_FEWEST_TRIALS, trials))

    def longest_first(
        self, most_bytes: int, begin: Collection[int] = (), kept: int | None = None
    ) -> set[int]:
        """Storages by falling gap, added to those of ``begin`` until the rest fits.

        All that can be kept again, the shortest gap first, is. ``kept`` is never added.
        """
        movable = self._settler.room.movable
        swapped = set(begin)
        held = self._settler.held_without(swapped)
        order = sorted(self._gaps, key=lambda number: (-self._gaps[number], number))
        for number in order:
            if int(held.max()) <= most_bytes:
                break
            if number not in swapped and number != kept:
                swapped.add(number)
                each = movable[number]
                held[each.first : each.end] -= each.num_bytes
        for number in reversed(order):
            if number in swapped:
                part = held[movable[number].first : movable[number].end]
                if int(part.max()) + self._sizes[number] <= most_bytes:
                    part += self._sizes[number]
                    swapped.discard(number)
        return swapped

    def best(self, most_bytes: int, starts: Collection[Collection[int]]) -> Settled | None:
        """The best of some sets, improved. None if none of them fits ``most_bytes``."""
        best: Settled | None = None
        preferences, preference = PREFERENCES, PREFERENCES[0]
        for swapped in {frozenset(each): None for each in starts}:
            for each in preferences:
                settled = self._settler.settle(swapped, most_bytes, each)
                if settled is not None and (best is None or is_better(settled, best)):
                    best, preference = settled, each
                if best is not None and not best.timing.waited:
                    break
            preferences = (preference,)
        return None if best is None else self._improve(best, most_bytes, preference)

    def sketch(self, most_bytes: int, starts: Collection[Collection[int]]) -> Settled | None:
        """The best of some sets in a hurry, not improved. None if none of them fits."""
        best: Settled | None = None
        for swapped in {frozenset(each): None for each in starts}:
            settled = self._settler.settle(swapped, most_bytes, PREFERENCES[0])
            if settled is not None and (best is None or is_better(settled, best)):
                best = settled
        return best

    def improved(self, most_bytes: int, sketch: Settled) -> Settled:
        """What local search makes of a sketch."""
        return self._improve(sketch, most_bytes, PREFERENCES[0])

    def _improve(self, best: Settled, most_bytes: int, preference: Preference) -> Settled:
        """Local search: take the first better neighbour until there is none, or trials run out."""
        left = self._num_trials
        improves = True
        while improves and best.timing.waited:
            improves = False
            for swapped in self._neighbours(best, most_bytes):
                if left <= 0:
                    return best
                left -= 1
                settled = self._settler.settle(swapped, most_bytes, preference)
                if settled is not None and is_better(settled, best):
                    best, improves = settled, True
                    break
        return best

    def _neighbours(self, settled: Settled, most_bytes: int) -> Iterator[set[int]]:
        """Sets that differ a little; first those without what was waited for most.

        One is kept, or others are swapped in its stead, or another one; or one more is swapped.
        """
        swapped = set(settled.choices)
        waited = settled.timing.waited
        kept = [number for number in self._gaps if number not in swapped]
        kept.sort(key=lambda number: (-self._gaps[number], number))
        by_wait = sorted(swapped, key=lambda x: (-waited.get(x, 0.0), self._gaps[x], x))
        for number in by_wait:
            yield self.longest_first(most_bytes, swapped - {number}, number)
        for number in by_wait:
            size = self._sizes[number]
            for other in sorted(kept, key=lambda x: abs(self._sizes[x] - size)):
                yield swapped - {number} | {other}
        for number in kept:
            yield swapped | {number}


def is_better(one: Settled, other: Settled) -> bool:
    """Whether a step is faster than another, or no slower with fewer bytes moved."""
    seconds, others = one.timing.seconds, other.timing.seconds
    return seconds < others * (1 - _IS_FASTER) or (
        seconds <= others and one.moved_bytes < other.moved_bytes
    )
