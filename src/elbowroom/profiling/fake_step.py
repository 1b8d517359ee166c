"""Profile of a step that never runs: shapes without data, for models that do not fit this machine.

Model and batch are PyTorch's FakeTensors, which have sizes and no bytes. Memory is the life of
their storages, so the workspaces of kernels are not seen: what a plan for such a profile promises
is a lower bound. Operators are those that PyTorch chooses for a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from elbowroom.core.cluster import Rate
from elbowroom.core.errors import MeasuringError
from elbowroom.core.step_profile import StepProfile
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import SMALLEST_BYTES, Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Copy
from elbowroom.swap.meter import MeterLog
from elbowroom.swap.tier import Slot, Tier

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")

_aten = torch.ops.aten
_UNWRITTEN = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
"""Operators that allocate, and neither read nor write."""


@dataclass(frozen=True)
class FakeRates:
    """A device as a step without data sees it: its FLOPs and its memory's bytes, one by one."""

    flops: Rate
    memory_bandwidth: Rate

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Seconds of an operator: of its FLOPs, and of the bytes that it reads and writes."""
        return flops / self.flops.achieved + num_bytes / self.memory_bandwidth.achieved


def profile_fake_step(
    make_model: Callable[[], Model],
    make_batch: Callable[[], Batch],
    loss_fn: Callable[[Model, Batch], torch.Tensor],
    rates: FakeRates,
    optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    smallest_bytes: int = SMALLEST_BYTES,
) -> StepProfile:
    """Profile a forward and backward without data, as ``Swap`` profiles a real one.

    Held when the step begins are weights, buffers, the optimizer's state and the batch; gradients
    are made in the step. Workspaces of kernels are missing, and seconds are those of ``rates``.

    Args:
        make_model: makes the model, on the CPU; called without memory for its weights.
        make_batch: makes the batch, called in the same way.
        loss_fn: runs the forward, and returns the loss.
        rates: what the device computes, reads and writes in a second.
        optimizer_fn: makes the optimizer of some parameters; None for one without state.
        smallest_bytes: saved storages below this size are kept.

    Raises MeasuringError for a model that asks for values, which a step without data does not have.

    """
    try:
        with FakeTensorMode():
            model, batch = make_model(), make_batch()
            state = _optimizer_state(model, optimizer_fn) if optimizer_fn else []
            held = [*model.parameters(), *model.buffers(), *state, *_tensors(batch)]
            return _profile(model, batch, loss_fn, rates, held, smallest_bytes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MeasuringError(
            f"the step asks for the values of a tensor ({error}): without data there are none, so "
            "leave that out of the step, or measure a smaller one with Swap"
        ) from error


def _profile(
    model: Model,
    batch: Batch,
    loss_fn: Callable[[Model, Batch], torch.Tensor],
    rates: FakeRates,
    held: Sequence[torch.Tensor],
    smallest_bytes: int,
) -> StepProfile:
    log = _FakeLog(rates)
    static_bytes, held_before = _num_bytes(held), {t.untyped_storage()._cdata for t in held}
    recorder = StepRecorder(model, log, static_bytes, smallest_bytes, clock=lambda: log.seconds)
    candidates = Candidates(model, smallest_bytes, plain=FakeTensor)
    step = SwappedStep(
        None,
        _NoLink(),
        candidates,
        observer=recorder,
        stays=lambda storage: storage._cdata in held_before,
    )
    with recorder.recording():
        with log, step.hooks():
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        step.end()
    return recorder.profile()


class _FakeLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Log of the storages that operators make, and of the seconds that they would take.

    A storage is known by its identity, as memory is by its address in the log of a ``Meter``.
    """

    def __init__(self, rates: FakeRates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self._rates = rates
        self._sizes: dict[int, int] = {}
        self._entries: list[tuple[int, int]] = []
        self._replaced: int | None = None
        """Storage which, if it goes next, became the newest one: then neither is in the log."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        out = func(*args, **kwargs)
        outputs = list(_tensors(out))
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        made = [each.untyped_storage() for each in outputs]
        is_view = all(storage._cdata in before for storage in made)
        if func.overloadpacket not in _UNWRITTEN and (func._schema.is_mutable or not is_view):
            num_bytes = sum(each.numel() * each.itemsize for each in (*inputs, *outputs))
            self.seconds += self._rates.seconds(_flops(func, args, kwargs, out), num_bytes)
        for storage in made:
            if storage._cdata not in before:
                self._see(storage)
        if func is _aten.add.Tensor and torch._C._current_graph_task_id() >= 0:
            self._note_sum(inputs[0], made[0])
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if num_bytes and key not in self._sizes:
            self._add(num_bytes, key)
            self._sizes[key] = num_bytes
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        num_bytes = self._sizes.pop(key)
        if key == self._replaced:
            self._entries.pop()
            self._replaced = None
        else:
            self._add(-num_bytes, key)

    def _add(self, num_bytes: int, key: int) -> None:
        self._entries.append((num_bytes, key))
        self._replaced = None

    def _note_sum(self, first: torch.Tensor, total: torch.UntypedStorage) -> None:
        """Note a sum of gradients, which is made in place if nobody else holds the first of them.

        Autograd does so, but not for FakeTensors: the first goes as soon as the sum is made.
        """
        key, newest = first.untyped_storage()._cdata, self._entries[-1]
        if newest == (self._sizes.get(key), total._cdata):
            self._replaced = key

    # What a StepLog does.

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def start_log(self) -> None:
        self._entries = []

    def stop_log(self) -> MeterLog:
        entries = np.array(self._entries, dtype=np.int64).reshape(-1, 2)
        return MeterLog(entries[:, 0], entries[:, 1])

    def mark(self) -> int:
        self._add(0, 0)
        return len(self._entries) - 1

    def address(self, storage: torch.UntypedStorage) -> int:
        return int(storage._cdata)


class _NoTier(Tier):
    """A tier without memory, for storages without bytes."""

    def __init__(self) -> None:
        super().__init__(capacity_bytes=2**62)

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        pass

    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        pass

    def close(self) -> None:
        pass


class _NoLink:
    """A link whose copies are made as soon as they are asked for: there is nothing to copy."""

    def __init__(self) -> None:
        self.tier = _NoTier()

    def ask(self, copy: Copy) -> None:
        copy.storage = None
        copy.done.set()

    def wait(self, copy: Copy) -> None:
        pass

    def check(self) -> None:
        pass


def _optimizer_state(
    model: nn.Module, optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
) -> list[torch.Tensor]:
    """What an optimizer keeps between steps, found by an update of each parameter alone.

    Some optimizers ask for the value of their count of steps when they have made their state.
    """
    state: list[torch.Tensor] = []
    for parameter in model.parameters():
        optimizer = optimizer_fn([parameter])
        parameter.grad = torch.empty_like(parameter)
        with suppress(DataDependentOutputException):
            optimizer.step()
        parameter.grad = None
        state += _tensors(list(optimizer.state.values()))
    return state


def _flops(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> float:
    """FLOPs by PyTorch's formulas: of products, convolutions and attention; 0 for all others."""
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0.0


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
