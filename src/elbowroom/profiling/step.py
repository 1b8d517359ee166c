"""Measures one training step while everything it saves is swapped: needs no more than the floor."""

from __future__ import annotations

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from elbowroom.core.errors import MeasuringError
from elbowroom.core.step_profile import ReadyGradient, SavedStorage, StepProfile
from elbowroom.swap.handles import SavedItem
from elbowroom.swap.hooks import StepObserver
from elbowroom.swap.meter import Meter, MeterLog


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


class StepRecorder(StepObserver):
    """Observer of one step in which everything is swapped at once; makes a profile of it.

    Run the step inside ``recording``, with this as the observer of a ``SwappedStep`` without a
    plan; then ask for ``profile``.

    Args:
        model: the model whose modules give storages their names.
        meter: the process's meter.
        static_bytes: bytes held when the step begins, those included that the meter does not see.
        smallest_bytes: the step's own limit for what is a candidate.
        swaps_optimizer: whether gradients leave while they are made.

    """

    def __init__(
        self,
        model: nn.Module,
        meter: Meter,
        static_bytes: int,
        smallest_bytes: int,
        swaps_optimizer: bool = False,
    ) -> None:
        self._model = model
        self._meter = meter
        self._static_bytes = static_bytes
        self._smallest_bytes = smallest_bytes
        self._swaps_optimizer = swaps_optimizer
        self._modules: list[str] = []
        self._seen: dict[int, _Seen] = {}
        self._positions: list[int] = []
        self._seconds: list[float] = []
        self._first_unpack: int | None = None
        self._last_end = 0.0
        self._log: MeterLog | None = None
        self._ready: dict[str, ReadyGradient] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Log the allocator and follow the modules while the block runs."""
        hooks = [
            hook
            for name, module in self._model.named_modules()
            for hook in self._follow(name, module)
        ]
        hooks += [
            parameter.register_post_accumulate_grad_hook(self._gradient_of(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._model.named_parameters()
            # Gradients of FSDP2's DTensors are its own to reduce, and hooks change how it does.
            if parameter.requires_grad and not hasattr(parameter, "_local_tensor")
        ]
        gc.collect()  # no garbage of before may go in between
        self._meter.start_log()
        self._last_end = time.perf_counter()
        try:
            yield
            self._seconds.append(time.perf_counter() - self._last_end)
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
        releases: dict[int, list[int]] = defaultdict(list)
        for position, address in enumerate(self._log.addresses.tolist()):
            if self._log.deltas[position] < 0:
                releases[address].append(position)
        num_ticks = len(self._positions)
        return StepProfile(
            seconds_before=self._seconds[0],
            seconds=tuple(self._seconds[1:]),
            num_forward_ticks=num_ticks if self._first_unpack is None else self._first_unpack,
            tick_positions=tuple(self._positions),
            deltas=tuple(self._log.deltas.tolist()),
            static_bytes=self._static_bytes,
            smallest_bytes=self._smallest_bytes,
            storages=tuple(
                _storage(number, seen, releases) for number, seen in sorted(self._seen.items())
            ),
            num_threads=torch.get_num_threads(),
            swaps_optimizer=self._swaps_optimizer,
            gradients=tuple(self._ready.values()),
        )

    # What a StepObserver is told.

    def ticked(self) -> None:
        self._seconds.append(time.perf_counter() - self._last_end)
        self._positions.append(self._meter.mark())

    def tick_ended(self) -> None:
        self._last_end = time.perf_counter()

    def packed(self, item: SavedItem, tick: int, storage: torch.UntypedStorage) -> None:
        seen = self._seen.get(item.number)
        if seen is None:
            made_by = self._modules[-1] if self._modules else ""
            seen = _Seen(storage.nbytes(), made_by, self._positions[-1], storage.data_ptr())
            self._seen[item.number] = seen
            weakref.finalize(item, self._forgotten, seen).atexit = False
        seen.pack_ticks.append(tick)

    def unpacked(self, item: SavedItem | None, tick: int) -> None:
        if self._first_unpack is None:
            self._first_unpack = tick
        if item is not None:
            self._seen[item.number].unpack_ticks.append(tick)

    def bringing(self, item: SavedItem) -> None:
        self._seen[item.number].bring = self._meter.num_entries

    def brought(self, item: SavedItem) -> None:
        assert item.tensor is not None
        self._seen[item.number].bring_address = item.tensor.data_ptr()

    def _gradient_of(self, name: str) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            self._ready.pop(name, None)  # several backwards: the last completes it
            tick = max(0, len(self._positions) - 1)
            self._ready[name] = ReadyGradient(tick, parameter.numel() * parameter.element_size())

        return ready

    def _forgotten(self, seen: _Seen) -> None:
        if self._log is None:
            seen.gone = self._meter.num_entries

    def _follow(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def enter(*_: Any) -> None:
            self._modules.append(name)

        def leave(*_: Any) -> None:
            self._modules.pop()

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]


def _storage(number: int, seen: _Seen, releases: dict[int, list[int]]) -> SavedStorage:
    release = seen.gone
    if seen.bring is not None:
        release = _first_after(releases[seen.bring_address], seen.bring)
    return SavedStorage(
        number=number,
        num_bytes=seen.num_bytes,
        made_by=seen.made_by,
        pack_ticks=tuple(seen.pack_ticks),
        unpack_ticks=tuple(seen.unpack_ticks),
        free=_first_after(releases[seen.address], seen.pack_position),
        bring=seen.bring,
        release=release,
    )


def _first_after(positions: list[int], begin: int) -> int | None:
    return next((position for position in positions if position > begin), None)
