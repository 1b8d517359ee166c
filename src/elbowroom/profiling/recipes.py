"""Recipes of the storages of a measured step, each tried once against the bytes that were saved."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.core.recipe import Recipe
from elbowroom.profiling.lineage import Draft, Lineage, State
from elbowroom.swap.checksum import checksum
from elbowroom.swap.handles import SavedItem
from elbowroom.swap.link import Copy, CopyLink
from elbowroom.swap.meter import Meter, MeterLog
from elbowroom.swap.recompute import Replay, fixed_tensors


class RecipeProver:
    """Replays a storage's calls before it is brought back, and keeps the recipe if bits agree.

    What a replay holds is left out of the step's log. It is tried only where there is room for it:
    elsewhere the recipe is dropped.

    Args:
        model: owner of the parameters and buffers.
        meter: the process's meter, whose log is on.
        lineage: the calls of the step, to be entered around its forward.
        most_bytes: most that the meter may count; None for any number.

    """

    def __init__(
        self, model: nn.Module, meter: Meter, lineage: Lineage, most_bytes: int | None
    ) -> None:
        self.recipes: dict[int, Recipe] = {}
        """Recipes that gave the bytes that were saved, by storage."""
        self._meter = meter
        self.lineage = lineage
        self._most_bytes = most_bytes
        self._fixed = fixed_tensors(model)
        self._saved: dict[State, int] = {}
        self._items: weakref.WeakValueDictionary[int, SavedItem] = weakref.WeakValueDictionary()
        self._states: dict[int, State] = {}
        self._checksums: dict[int, int] = {}
        self._spans: list[tuple[int, int]] = []

    def saved(self, item: SavedItem, storage: torch.UntypedStorage) -> None:
        """Note what is saved now, maybe by a call that has yet to return."""
        state = self.lineage.state_of(storage, item.version)
        self._states[item.number] = state
        self._saved[state] = item.number
        self._items[item.number] = item
        self._checksums[item.number] = checksum(storage)

    def prove(self, item: SavedItem, link: CopyLink) -> None:
        """Try the recipe of a storage that is away, if it has one."""
        state = self._states.pop(item.number, None)
        if state is None:
            return
        before = {other: number for other, number in self._saved.items() if number < item.number}
        draft = self.lineage.draft(state, before)
        if draft is None:
            return
        found = {number: self._items.get(number) for number in draft.sources}
        sources = {number: source for number, source in found.items() if source is not None}
        if len(sources) < len(found) or not self._has_room(item, draft, list(sources.values())):
            return
        with self._outside_of_log():
            try:
                recipe = self._try(item, draft, sources, link)
            except (InputError, RuntimeError, TypeError):
                return  # not to be replayed, no memory for it, or a source was written since
        if recipe is not None:
            self.recipes[item.number] = recipe

    def cut(self, log: MeterLog) -> tuple[MeterLog, list[int]]:
        """The log without what replays held, and for each old position its new one."""
        is_kept = np.ones(len(log.deltas), dtype=bool)
        for begin, end in self._spans:
            is_kept[begin:end] = ~_is_transient(log, begin, end)
        places = np.concatenate(([0], np.cumsum(is_kept)))
        return MeterLog(log.deltas[is_kept], log.addresses[is_kept]), places.tolist()

    def _has_room(self, item: SavedItem, draft: Draft, sources: list[SavedItem]) -> bool:
        """Whether a replay fits, by what its calls held at most in the forward, all added."""
        if self._most_bytes is None:
            return True
        needed = sum(source.num_bytes for source in sources if source.is_away)
        for begin, end in draft.windows:
            needed += _most_held(self._meter.log_between(begin, end))
        return self._meter.held_bytes + needed + item.num_bytes <= self._most_bytes

    def _try(
        self, item: SavedItem, draft: Draft, sources: dict[int, SavedItem], link: CopyLink
    ) -> Recipe | None:
        """The recipe with its costs; None if it gives other bytes."""
        replay = Replay(Recipe(draft.calls, draft.result, 0.0, 0), self._fixed)
        here = {number: _bytes_of(source, link) for number, source in sources.items()}
        versions = {number: tensor._version for number, tensor in here.items()}
        first, begin = self._meter.num_entries, time.perf_counter()
        storage = replay.run(here).untyped_storage()
        checked = time.perf_counter()
        is_same = checksum(storage) == self._checksums[item.number]
        end = time.perf_counter()
        seconds = end - begin + (end - checked)  # a run takes the first checksum at the save
        held = _most_held(self._meter.log_between(first, self._meter.num_entries))
        is_same &= storage.nbytes() == item.num_bytes
        is_same &= versions == {number: tensor._version for number, tensor in here.items()}
        extra_bytes = max(0, held - item.num_bytes)
        return Recipe(draft.calls, draft.result, seconds, extra_bytes) if is_same else None

    @contextmanager
    def _outside_of_log(self) -> Iterator[None]:
        is_collecting = gc.isenabled()
        gc.disable()  # nobody's garbage goes meanwhile
        begin = self._meter.num_entries
        try:
            yield
        finally:
            self._spans.append((begin, self._meter.num_entries))
            if is_collecting:
                gc.enable()


def recipe_prover(
    model: nn.Module, meter: Meter, most_bytes: int | None = None
) -> RecipeProver | None:
    """A prover; None for compiled models: what is noted there is compiled in, too."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            return None
    return RecipeProver(model, meter, Lineage(model, meter), most_bytes)


def _bytes_of(item: SavedItem, link: CopyLink) -> torch.Tensor:
    """A tensor of a storage: what is here, or a copy of what is away."""
    if item.tensor is not None:
        item.check()
        return item.tensor
    assert item.slot is not None
    borrowed = torch.empty(item.num_bytes, dtype=torch.uint8)
    copy = Copy("in", borrowed.untyped_storage(), item.slot)
    link.ask(copy)
    link.wait(copy)
    return borrowed


def _most_held(log: MeterLog) -> int:
    """Most bytes that a part of a log holds over its begin."""
    return max(0, int(np.cumsum(log.deltas).max(initial=0)))


def _is_transient(log: MeterLog, begin: int, end: int) -> npt.NDArray[np.bool_]:
    """Which entries of a part of a log are of blocks that were both made and released in it."""
    open_at: dict[int, int] = {}
    is_transient = np.zeros(end - begin, dtype=bool)
    for place in range(begin, end):
        address = int(log.addresses[place])
        if log.deltas[place] > 0:
            open_at[address] = place
        elif log.deltas[place] < 0 and address in open_at:
            is_transient[[open_at.pop(address) - begin, place - begin]] = True
    return is_transient
