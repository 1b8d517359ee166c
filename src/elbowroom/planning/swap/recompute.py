"""Which storages are made again, and the step that is left for the others to be planned in.

A storage that is recomputed is dropped at once and costs a replay at its first use, for which its
sources must be there. So the rest is planned in a step in which it is no longer to be chosen, its
replay is compute, and its sources are needed earlier.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from elbowroom.core.recipe import Recipe
from elbowroom.core.step_profile import SavedStorage, StepProfile
from elbowroom.plans.swap import Recomputed

_LEVELS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Parts of what can be recomputed, by bytes, that are tried."""


class _Inserted(NamedTuple):
    """A new entry of the log, after the old entry ``after`` (-1: before all)."""

    after: int
    delta: int


def recompute_sets(profile: StepProfile) -> list[frozenset[int]]:
    """Sets of storages to recompute, each within the next, that cost the fewest seconds per byte.

    No source of one is in the set. The first set is empty.
    """
    order = _cheapest_first(profile)
    sizes = [profile.storages[number].num_bytes for number in order]
    total, sets = sum(sizes), [frozenset[int]()]
    for level in _LEVELS:
        count, held = 0, 0
        while count < len(order) and held < level * total:
            held += sizes[count]
            count += 1
        if count > len(sets[-1]):
            sets.append(frozenset(order[:count]))
    return sets


def neighbour_sets(
    profile: StepProfile, numbers: frozenset[int], others: Iterable[int]
) -> Iterator[frozenset[int]]:
    """Sets with one more of ``others``, instead of those it cannot go with, or with one less."""
    for number in others:
        storage = profile.storages[number]
        if storage.recipe is not None and number not in numbers:
            reads = {number, *storage.recipe.sources}
            kept = {one for one in numbers if one not in reads and not _reads(profile, one, number)}
            yield frozenset({number, *kept})
    by_cost = sorted(numbers, key=lambda one: (-_recipe(profile.storages[one]).seconds, one))
    for number in by_cost:
        if len(numbers) > 1:
            yield numbers - {number}


def _reads(profile: StepProfile, number: int, source: int) -> bool:
    return source in _recipe(profile.storages[number]).sources


def recomputed(profile: StepProfile, numbers: Collection[int]) -> list[Recomputed]:
    """The choices to recompute some storages, which have recipes."""
    return [Recomputed(number, _recipe(profile.storages[number])) for number in sorted(numbers)]


def with_recomputed(profile: StepProfile, numbers: Collection[int]) -> StepProfile:
    """The step in which storages are recomputed: what is to be chosen for the others is the same.

    They stay in it by number, without bytes. Peaks and seconds of other choices in it are those of
    the same choices beside ``recomputed`` ones in the first profile, as long as sources are back
    when they are read.
    """
    if not numbers:
        return profile
    storages = {storage.number: storage for storage in profile.storages}
    seconds = list(profile.seconds)
    needs = _needs(profile, numbers)
    brings, others = [], []
    for number, tick in sorted(needs.items()):
        source = storages[number]
        assert source.bring is not None
        brings.append(_Inserted(profile.tick_positions[tick], source.num_bytes))
        others.append(_Inserted(source.bring - 1, -source.num_bytes))  # it was there already
    for number in sorted(numbers):
        storage, recipe = storages[number], _recipe(storages[number])
        assert storage.use_tick is not None and storage.bring is not None
        seconds[storage.use_tick] += recipe.seconds
        if recipe.extra_bytes:
            others.append(_Inserted(storage.bring, recipe.extra_bytes))
            others.append(_Inserted(storage.bring, -recipe.extra_bytes))
        storages[number] = replace(storage, num_bytes=0, free=None)
    inserted = sorted([*brings, *others], key=lambda each: each.after)
    timed = replace(profile, seconds=tuple(seconds))
    return _with_entries(timed, storages, inserted, needs)


def _cheapest_first(profile: StepProfile) -> list[int]:
    """Storages that may be recomputed together, by seconds per byte."""
    found = [
        storage
        for storage in profile.storages
        if storage.recipe is not None and not storage.is_held_elsewhere and storage.num_bytes
    ]
    found.sort(key=lambda each: (_recipe(each).seconds / each.num_bytes, each.number))
    taken: dict[int, None] = {}
    sources: set[int] = set()
    for storage in found:
        reads = _recipe(storage).sources
        if storage.number not in sources and not any(number in taken for number in reads):
            taken[storage.number] = None
            sources.update(reads)
    return list(taken)


def _needs(profile: StepProfile, numbers: Collection[int]) -> dict[int, int]:
    """Tick at which a source is read, for those that the backward needs later only."""
    needs: dict[int, int] = {}
    for storage in (profile.storages[number] for number in numbers):
        for number in _recipe(storage).sources:
            use, own = storage.use_tick, profile.storages[number].use_tick
            assert use is not None and own is not None
            if use < needs.get(number, own):
                needs[number] = use
    return needs


def _with_entries(
    profile: StepProfile,
    storages: dict[int, SavedStorage],
    inserted: list[_Inserted],
    needs: dict[int, int],
) -> StepProfile:
    """Add entries to the log; sources of ``needs`` are brought by the first after their ticks."""
    afters = [each.after for each in inserted]

    def moved(place: int | None) -> int | None:
        return None if place is None else place + bisect_left(afters, place)

    deltas: list[int] = []
    begin = 0
    for each in inserted:
        deltas += [*profile.deltas[begin : each.after + 1], each.delta]
        begin = each.after + 1
    deltas += profile.deltas[begin:]
    ticks = [moved(place) for place in profile.tick_positions]
    brought: dict[int, int] = {}
    changed = []
    for number, storage in sorted(storages.items()):
        uses, bring = storage.unpack_ticks, moved(storage.bring)
        if number in needs:
            tick = needs[number]
            place = ticks[tick]
            assert place is not None
            brought[tick] = brought.get(tick, 0) + 1
            uses, bring = (tick, *uses), place + brought[tick]
        free, release = moved(storage.free), moved(storage.release)
        changed.append(
            replace(
                storage,
                unpack_ticks=uses,
                free=free,
                bring=bring,
                release=release,
                recipe=None,
            )
        )
    return replace(
        profile,
        tick_positions=tuple(place for place in ticks if place is not None),
        deltas=tuple(deltas),
        storages=tuple(changed),
    )


def _recipe(storage: SavedStorage) -> Recipe:
    assert storage.recipe is not None
    return storage.recipe
