"""Measures one training step while everything it saves is swapped: needs no more than the floor."""

from __future__ import annotations

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from elbowroom.core.errors import MeasuringError
from elbowroom.core.recipe import Recipe
from elbowroom.core.step_profile import ReadyGradient, SavedStorage, StepProfile, can_read
from elbowroom.profiling.recipes import RecipeProver
from elbowroom.swap.handles import SavedItem
from elbowroom.swap.link import CopyLink
from elbowroom.swap.meter import MeterLog, gradient_bytes
from elbowroom.swap.observer import StepObserver


class StepLog(Protocol):
    """Whoever sees what a step allocates and releases, in order: a ``Meter``, or a stand-in."""

    @property
    def num_entries(self) -> int:
        """Length of the log: the position of the next entry."""

    def start_log(self) -> None:
        """Begin a new log."""

    def stop_log(self) -> MeterLog:
        """End the log and return it."""

    def mark(self) -> int:
        """Add an entry of 0 bytes. Returns its position."""

    def address(self, storage: torch.UntypedStorage) -> int:
        """What the log calls a storage's memory, until that is released."""


@dataclass
class _Seen:
    """What was seen of one storage; positions are those of the meter's log."""

    num_bytes: int
    made_by: str
    pack_position: int
    address: int
    pack_ticks: list[int] = field(default_factory=list)
    unpack_ticks: list[int] = field(default_factory=list)
    bring: int | None = None
    bring_address: int = 0
    gone: int | None = None
    stayed: bool = False
    """Whether it was kept, as it was there before the step: somebody else holds it."""


class StepRecorder(StepObserver):
    """Observer of one step in which everything is swapped at once; makes a profile of it.

    Run the step inside ``recording``, with this as the observer of a ``SwappedStep`` without a
    plan; then ask for ``profile``.

    Args:
        model: the model whose modules give storages their names.
        meter: the process's meter, or a stand-in for it.
        static_bytes: bytes held when the step begins, those included that the meter does not see.
        smallest_bytes: the step's own limit for what is a candidate.
        swaps_optimizer: whether gradients leave while they are made.
        prover: notes how storages are made, and tries it before they come back; None for no
            recipes.
        clock: the seconds now.

    """

    def __init__(
        self,
        model: nn.Module,
        meter: StepLog,
        static_bytes: int,
        smallest_bytes: int,
        *,
        swaps_optimizer: bool = False,
        prover: RecipeProver | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._meter = meter
        self._static_bytes = static_bytes
        self._smallest_bytes = smallest_bytes
        self._swaps_optimizer = swaps_optimizer
        self._now = clock
        self._modules: list[str] = []
        self._seen: dict[int, _Seen] = {}
        self._positions: list[int] = []
        self._seconds: list[float] = []
        self._first_unpack: int | None = None
        self._last_end = 0.0
        self._log: MeterLog | None = None
        self._held_gradient_bytes = 0
        self._prover = prover
        self._ready: dict[str, ReadyGradient] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Log the allocator and follow the modules while the block runs."""
        hooks = [
            hook
            for name, module in self._model.named_modules()
            for hook in self._follow(name, module)
        ]
        self._held_gradient_bytes = gradient_bytes(self._model)
        hooks += [
            parameter.register_post_accumulate_grad_hook(self._gradient_of(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._model.named_parameters()
            # Gradients of FSDP2's DTensors are its own to reduce, and hooks change how it does.
            if parameter.requires_grad and not hasattr(parameter, "_local_tensor")
        ]
        gc.collect()  # no garbage of before may go in between
        self._meter.start_log()
        self._last_end = self._now()
        try:
            yield
            self._seconds.append(self._seconds_since())
        finally:
            self._log = self._meter.stop_log()
            for hook in hooks:
                hook.remove()

    def profile(self) -> StepProfile:
        """The profile of the step that was recorded. Raises MeasuringError if it saved nothing."""
        if self._log is None or not self._positions:
            raise MeasuringError(
                "the step saved no tensor for a backward: run forward and backward inside of it"
            )
        log, places = self._log, list(range(len(self._log.deltas) + 1))
        recipes: Mapping[int, Recipe] = {}
        if self._prover is not None:
            log, places = self._prover.cut(log)
            recipes = self._prover.recipes
        releases: dict[int, list[int]] = defaultdict(list)
        for position, address in enumerate(log.addresses.tolist()):
            if log.deltas[position] < 0:
                releases[address].append(position)
        storages = [
            _storage(number, seen, releases, places, recipes.get(number))
            for number, seen in sorted(self._seen.items())
        ]
        num_ticks = len(self._positions)
        return StepProfile(
            seconds_before=self._seconds[0],
            seconds=tuple(self._seconds[1:]),
            num_forward_ticks=num_ticks if self._first_unpack is None else self._first_unpack,
            tick_positions=tuple(places[position] for position in self._positions),
            deltas=tuple(log.deltas.tolist()),
            static_bytes=self._static_bytes,
            smallest_bytes=self._smallest_bytes,
            storages=tuple(_without_lost_sources(each, storages) for each in storages),
            num_threads=torch.get_num_threads(),
            held_gradient_bytes=self._held_gradient_bytes,
            swaps_optimizer=self._swaps_optimizer,
            gradients=tuple(self._ready.values()),
        )

    # What a StepObserver is told.

    def ticked(self) -> None:
        self._seconds.append(self._seconds_since())
        self._positions.append(self._meter.mark())

    def tick_ended(self) -> None:
        self._last_end = self._now()

    def packed(self, item: SavedItem, tick: int, storage: torch.UntypedStorage) -> None:
        seen = self._seen.get(item.number)
        if seen is None:
            made_by = self._modules[-1] if self._modules else ""
            address = self._meter.address(storage)
            seen = _Seen(storage.nbytes(), made_by, self._positions[-1], address)
            self._seen[item.number] = seen
            weakref.finalize(item, self._forgotten, seen).atexit = False
            if self._prover is not None:
                self._prover.saved(item, storage)
        seen.pack_ticks.append(tick)

    def unpacked(self, item: SavedItem | None, tick: int) -> None:
        if self._first_unpack is None:
            self._first_unpack = tick
        if item is not None:
            seen = self._seen[item.number]
            seen.unpack_ticks.append(tick)
            if item.choice is None and seen.bring is None:
                seen.bring, seen.stayed = self._meter.num_entries, True

    def bringing(self, item: SavedItem, link: CopyLink) -> None:
        if self._prover is not None:
            self._prover.prove(item, link)
        self._seen[item.number].bring = self._meter.num_entries

    def brought(self, item: SavedItem) -> None:
        assert item.tensor is not None
        self._seen[item.number].bring_address = self._meter.address(item.tensor.untyped_storage())

    def _gradient_of(self, name: str) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            self._ready.pop(name, None)  # several backwards: the last completes it
            tick = max(0, len(self._positions) - 1)
            self._ready[name] = ReadyGradient(tick, parameter.numel() * parameter.element_size())

        return ready

    def _forgotten(self, seen: _Seen) -> None:
        if self._log is None:
            seen.gone = self._meter.num_entries

    def _seconds_since(self) -> float:
        """Seconds since the last hook, without those of noting calls."""
        noting = 0.0 if self._prover is None else self._prover.lineage.spent_seconds()
        return max(0.0, self._now() - self._last_end - noting)

    def _follow(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(*_: Any) -> None:
            if self._prover is not None and not self._modules:
                self._prover.lineage.__enter__()  # type: ignore[no-untyped-call]
            self._modules.append(name)

        def leave(*_: Any) -> None:
            self._modules.pop()
            if self._prover is not None and not self._modules:
                self._prover.lineage.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]


def _storage(
    number: int,
    seen: _Seen,
    releases: dict[int, list[int]],
    places: Sequence[int],
    recipe: Recipe | None,
) -> SavedStorage:
    """A storage with positions in the log that was cut, by those in the log that was recorded."""
    release = None if seen.gone is None else places[seen.gone]
    bring = None if seen.bring is None else places[seen.bring]
    free = _first_after(releases[seen.address], places[seen.pack_position])
    if seen.stayed:
        free, release = None, bring  # there is no second copy
    elif bring is not None:
        release = _first_after(releases[seen.bring_address], bring)
    return SavedStorage(
        number=number,
        num_bytes=seen.num_bytes,
        made_by=seen.made_by,
        pack_ticks=tuple(seen.pack_ticks),
        unpack_ticks=tuple(seen.unpack_ticks),
        free=free,
        bring=bring,
        release=release,
        recipe=recipe,
    )


def _without_lost_sources(storage: SavedStorage, storages: list[SavedStorage]) -> SavedStorage:
    """The storage, without a recipe that reads what is gone by the time of its first use."""
    if storage.recipe is None:
        return storage
    if all(can_read(storage, storages[number]) for number in storage.recipe.sources):
        return storage
    return replace(storage, recipe=None)


def _first_after(positions: list[int], begin: int) -> int | None:
    return next((position for position in positions if position > begin), None)
