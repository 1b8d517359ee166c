"""Measurement of the memory that a model's layers need, in one training step without an update.

All layers run forward, then all backward in one go, and what nobody needs any more is released, as
in a stage of a pipeline. A layer's own part is the allocator's peak during its passes, less what
the other layers hold then (``core.layer_graph.LayerMemory``). So the parts add up to what was
measured; where the peak was below what the other layers hold, a layer's own part is 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from elbowroom.core.layer_graph import LayerMemory
from elbowroom.training.memory_watch import MemoryWatch
from elbowroom.training.stage import StageModule
from elbowroom.training.traced import TracedModel
from elbowroom.training.values import tensors_in

Tensors = dict[str, torch.Tensor]
Loss = Callable[[Any], torch.Tensor]


def measure_memory(
    traced: TracedModel,
    stages: Mapping[str, StageModule],
    last: StageModule,
    inputs: Tensors,
    loss: Loss | None,
) -> dict[str, LayerMemory]:
    """Measure every layer in ``stages``, each of which is a stage of that layer alone.

    ``last`` gives the model's outputs, from which ``loss`` computes a number (default: the sum of
    all that need gradients). What that takes counts in the model's last layer. ``inputs`` are by
    name.
    """
    sweep = _Sweep(traced.layers[-1].name, stages)
    sweep.note_weights(traced.model)
    with MemoryWatch(_device_of(traced.model)) as watch:
        sweep.run(watch, last, inputs, loss)
    peaks: dict[str, int] = {}
    for section in watch.sections:
        peaks[section.name] = max(peaks.get(section.name, 0), section.peak_bytes)
    return sweep.needs(peaks)


@dataclass(eq=False)
class _Sweep:
    """Record of which layer made which storage, and which of them a backward reads.

    Storages are told apart by their addresses. A storage that is kept has its address until the
    end; the address of another may be used again, so ``_makers`` has only those that are in use.
    """

    final: str
    stages: Mapping[str, StageModule]
    input_bytes: int = 0
    _weights: set[int] = field(default_factory=set)
    _makers: dict[int, str] = field(default_factory=dict)
    _kept: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    _given: defaultdict[str, list[_Given]] = field(default_factory=lambda: defaultdict(list))

    def note_weights(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def run(
        self, watch: MemoryWatch, last: StageModule, inputs: Tensors, loss: Loss | None
    ) -> None:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        self.input_bytes = sum(tensor.nbytes for tensor in held.values())
        tensors = dict(held)
        stages = (*self.stages.values(), last)
        readings = Counter(name for stage in stages for name in _reads(stage))
        for name, stage in self.stages.items():
            watch.mark(_forward(name))
            self._forward(watch, name, stage, tensors, readings)
        watch.mark(_forward(self.final))
        total = self._loss(last, _take(last, tensors, readings), loss)
        watch.mark(_backward(self.final))
        trained = [p for stage in self.stages.values() for p in stage.parameters()]
        trained = [parameter for parameter in trained if parameter.requires_grad]
        if trained and total.requires_grad:
            torch.autograd.grad(total, trained, allow_unused=True)

    def needs(self, peaks: Mapping[str, int]) -> dict[str, LayerMemory]:
        """Memory of each layer, from the peak of each section."""
        found: dict[str, LayerMemory] = {}
        weights = _weights(self.stages)
        before, behind = self.input_bytes, sum(weights.values())
        for name in dict.fromkeys((*self.stages, self.final)):
            parameters = self.stages[name].parameters() if name in self.stages else ()
            kept_bytes = sum(self._kept[name].values())
            before += kept_bytes
            behind -= weights.get(name, 0)
            found[name] = LayerMemory(
                kept_bytes=kept_bytes,
                loose_bytes=sum(
                    given.num_bytes
                    for given in self._given[name]
                    if given.address not in self._kept[given.maker]
                ),
                forward_bytes=max(0, peaks.get(_forward(name), 0) - before),
                backward_bytes=max(0, peaks.get(_backward(name), 0) - before - behind),
                largest_parameter_bytes=max((one.nbytes for one in parameters), default=0),
            )
        return found

    def _forward(
        self,
        watch: MemoryWatch,
        name: str,
        stage: StageModule,
        tensors: Tensors,
        readings: Counter[str],
    ) -> None:
        read = _take(stage, tensors, readings)
        known = {address: self._makers.get(address, "") for address in map(_address, read)}
        with self._noting(name, known):
            outputs = stage(*read)
        before = {None, *(tensor.grad_fn for tensor in read)}
        for tensor_name, output in zip(stage.passes, outputs, strict=True):
            address = _address(output)
            self._makers[address] = known.get(address, name)
            size = output.untyped_storage().nbytes()
            self._given[name].append(_Given(self._makers[address], address, size))
            if output.grad_fn not in before:
                output.register_hook(partial(_mark, watch, _backward(name)))
            if readings[tensor_name]:
                tensors[tensor_name] = output

    def _loss(self, last: StageModule, read: list[torch.Tensor], loss: Loss | None) -> torch.Tensor:
        known = {address: self._makers.get(address, "") for address in map(_address, read)}
        with self._noting(self.final, known):
            result = last(*read)
            return _total(result) if loss is None else loss(result)

    def _noting(self, name: str, known: Mapping[int, str]) -> saved_tensors_hooks:
        """Hooks that record what a running layer saves; ``known`` has the makers of its inputs."""

        def note(tensor: torch.Tensor) -> torch.Tensor:
            address = _address(tensor)
            if address not in self._weights:
                size = tensor.untyped_storage().nbytes()
                self._kept[known.get(address, name)][address] = size
            return tensor

        return saved_tensors_hooks(note, lambda tensor: tensor)


class _Given(NamedTuple):
    """A storage that holds a layer's output."""

    maker: str
    address: int
    num_bytes: int


def _forward(name: str) -> str:
    return f"forward {name}"


def _backward(name: str) -> str:
    return f"backward {name}"


def _mark(watch: MemoryWatch, section: str, gradient: torch.Tensor) -> None:
    watch.mark(section)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reads(stage: StageModule) -> tuple[str, ...]:
    return (*stage.receives, *stage.loads)


def _take(stage: StageModule, tensors: Tensors, readings: Counter[str]) -> list[torch.Tensor]:
    """Tensors that a stage reads; the last reader removes them from ``tensors``."""
    names = _reads(stage)
    readings.subtract(names)
    return [tensors[name] if readings[name] else tensors.pop(name) for name in names]


def _weights(stages: Mapping[str, StageModule]) -> dict[str, int]:
    """Bytes of each layer's trained weights; tied ones count in the first layer."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, stage in stages.items():
        own = {id(p): p.nbytes for p in stage.parameters() if p.requires_grad and id(p) not in seen}
        seen |= own.keys()
        sizes[name] = sum(own.values())
    return sizes


def _total(result: Any) -> torch.Tensor:
    sums = [tensor.sum() for tensor in tensors_in(result) if tensor.requires_grad]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
