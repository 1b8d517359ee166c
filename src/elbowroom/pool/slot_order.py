"""Which slot each layer comes into, the same in every pass, and in which order slots are filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from elbowroom.plans.pool_actions import Fetch


@dataclass(frozen=True)
class SlotOrder:
    """A fixed slot for every layer, and the fetches of all passes.

    Whenever compute gives a layer back, its slot is free for the next one in the plan's order: so a
    layer's slot is known before anything runs. ``first`` are the fetches that fill the slots at the
    start, ``rest`` those that follow in a pass, and ``ahead`` are ``first`` in the order in which a
    pass gives their slots back.
    """

    slot_of: Mapping[int, int]
    first: tuple[Fetch, ...]
    rest: tuple[Fetch, ...]
    ahead: tuple[Fetch, ...]

    @staticmethod
    def of(fetches: Sequence[Fetch], num_slots: int) -> SlotOrder:
        """The order for the fetches of one pass, whose layers compute uses in ascending order."""
        order = list(dict.fromkeys(fetch.layer for fetch in fetches))
        used = sorted(order)
        slot_of = {layer: slot for slot, layer in enumerate(order[:num_slots])}
        for released, layer in zip(used, order[num_slots:], strict=False):
            slot_of[layer] = slot_of[released]
        last_use = {slot_of[layer]: position for position, layer in enumerate(used)}
        first = tuple(fetch for fetch in fetches if fetch.layer in order[:num_slots])
        rest = tuple(fetch for fetch in fetches if fetch.layer not in order[:num_slots])
        ahead = tuple(sorted(first, key=lambda fetch: last_use[slot_of[fetch.layer]]))
        return SlotOrder(slot_of, first, rest, ahead)

    def all_passes(self) -> Iterator[Fetch]:
        """Fetches from the start on, without an end."""
        return chain(self.first, chain.from_iterable(repeat((*self.rest, *self.ahead))))
