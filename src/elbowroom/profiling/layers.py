"""Profile of a model in training, layer by layer: what a planner of pipelines needs to know.

A sweep is one step of training without the optimizer. Forward, each layer reads what the layers
before it really gave; backward, it turns the gradient of its output into those of its inputs and
weights. So each layer finds the caches that its neighbours have filled, as in training. The first
sweeps are dropped, and medians are taken over the others.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import Layer, LayerGraph, LayerMemory
from elbowroom.profiling.layer_memory import measure_memory
from elbowroom.profiling.updates import update_seconds, with_updates
from elbowroom.training.layers import trace_model
from elbowroom.training.outcome import in_training, untouched
from elbowroom.training.script import OptimizerFunction
from elbowroom.training.stage import Part, StageModule, build_stage
from elbowroom.training.traced import TracedLayer, TracedModel

WARM_UP_SWEEPS = 2
LEAST_SWEEPS = 5
MOST_SWEEPS = 200
LEAST_SECONDS = 1.0

LossFn = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class SweepLimits:
    """Limits of a measurement: at least ``least`` sweeps and ``seconds`` seconds of them.

    Never more than ``most`` sweeps. Raises InputError for limits that allow none.
    """

    least: int = LEAST_SWEEPS
    seconds: float = LEAST_SECONDS
    most: int = MOST_SWEEPS

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InputError(f"{self.least} to {self.most} sweeps: give at least 1")


def profile(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    limits: SweepLimits | None = None,
    optimizer_fn: OptimizerFunction | None = None,
) -> LayerGraph:
    """Measure times and sizes of a model's layers, in training mode, on the model's device.

    Args:
        model: an ``nn.Sequential``, whose children are the layers, or what ``torch.fx`` or
            ``torch.export`` can trace. Its weights, buffers, gradients, modes and torch's random
            numbers stay as they are.
        batch: the model's inputs (a tensor, a tuple of positional or a dict of named arguments);
            with ``loss_fn`` a pair of them and the targets.
        loss_fn: gives a number from outputs and targets. Its time counts in the last layer. Without
            it the gradients of the outputs are ones.
        limits: how long to measure.
        optimizer_fn: makes an optimizer of parameters, such as ``partial(torch.optim.AdamW,
            lr=1e-3)``; without it updates take no time.

    The bytes of a tied parameter count in the first layer that uses it; plans keep layers that
    share parameters, or running statistics, in one stage.

    Raises InputError if the model or the loss does not run on the batch, UntraceableModelError if
    the forward cannot be written down as layers.

    """
    inputs, targets = (batch, None) if loss_fn is None else _pair(batch)
    with untouched(model):
        traced = trace_model(in_training(model), inputs)
        return measure(traced, inputs, targets, loss_fn, limits or SweepLimits(), optimizer_fn)


def measure(
    traced: TracedModel,
    inputs: Any,
    targets: Any,
    loss_fn: LossFn | None,
    limits: SweepLimits,
    optimizer_fn: OptimizerFunction | None,
) -> LayerGraph:
    """Measure as ``profile`` does, for a model that is already traced, in the mode of its trace."""
    with untouched(traced.model), torch.enable_grad():
        sweeps = _Sweeps(traced, inputs, targets, loss_fn)
        for _ in range(WARM_UP_SWEEPS):
            sweeps.run()
        sweeps.forget_times()
        begin = time.perf_counter()
        for count in range(limits.most):
            if count >= limits.least and time.perf_counter() - begin >= limits.seconds:
                break
            sweeps.run()
        memory = sweeps.measure_memory(traced)
    graph = _graph(traced, sweeps, memory)
    if optimizer_fn is None:
        return graph
    return with_updates(graph, update_seconds(traced.model.parameters(), optimizer_fn))


@dataclass(eq=False)
class _Timed:
    """A layer, or the loss, and the seconds of its runs."""

    stage: StageModule
    parameters: tuple[nn.Parameter, ...]
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Ran:
    """Inputs and outputs of a layer between its forward and its backward."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


class _Sweeps:
    """Sweeps: run all layers forward, then all backward, and keep the times."""

    def __init__(
        self, traced: TracedModel, inputs: Any, targets: Any, loss_fn: LossFn | None
    ) -> None:
        self._inputs = traced.named_inputs(inputs)
        self._targets, self._loss_fn = targets, loss_fn
        self.layers = {
            layer.name: _timed(traced, layer) for layer in traced.layers if layer.value is not None
        }
        names = tuple(name for name in traced.results if name in traced.by_name)
        self.loss = _Timed(build_stage(traced, Part((), names, (), ()), is_last=True), ())
        self._facts = traced.tensors
        self._wait = _waiter(traced.model)

    def forget_times(self) -> None:
        for timed in (*self.layers.values(), self.loss):
            timed.forward.clear()
            timed.backward.clear()

    def measure_memory(self, traced: TracedModel) -> dict[str, LayerMemory]:
        inputs = {layer.name for layer in traced.layers if layer.is_input}
        stages = {name: timed.stage for name, timed in self.layers.items() if name not in inputs}
        loss_fn = self._loss_fn
        loss = None if loss_fn is None else lambda outputs: loss_fn(outputs, self._targets)
        return measure_memory(traced, stages, self.loss.stage, self._inputs, loss)

    def run(self) -> None:
        tensors = {name: tensor.clone() for name, tensor in self._inputs.items()}
        ran = {name: self._forward(timed, tensors) for name, timed in self.layers.items()}
        gradients: dict[str, torch.Tensor] = {}
        self._run_loss(tensors, gradients)
        for name in reversed(list(ran)):
            self._backward(self.layers[name], ran.pop(name), gradients)

    def _forward(self, timed: _Timed, tensors: dict[str, torch.Tensor]) -> _Ran:
        inputs = self._leaves(timed.stage, tensors)
        begin = self._now()
        outputs = timed.stage(*inputs)
        timed.forward.append(self._now() - begin)
        for name, output in zip(timed.stage.passes, outputs, strict=True):
            tensors[name] = output.detach()
        return _Ran(inputs, outputs)

    def _run_loss(
        self, tensors: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> None:
        names = self.loss.stage.receives
        if self._loss_fn is None:
            for name in names:
                if self._facts[name].needs_grad:
                    gradients[name] = torch.ones_like(tensors[name])
            return
        inputs = self._leaves(self.loss.stage, tensors)
        outputs = self.loss.stage(*inputs)
        begin = self._now()
        try:
            loss = self._loss_fn(outputs, self._targets)
        except Exception as error:
            raise InputError(f"loss_fn failed on the model's outputs: {error}") from error
        _check_loss(loss)
        at_backward = self._now()
        self.loss.forward.append(at_backward - begin)
        wanted = {n: x for n, x in zip(names, inputs, strict=True) if x.requires_grad}
        found = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True)
        self.loss.backward.append(self._now() - at_backward)
        _add(gradients, [*wanted], found)

    def _backward(self, timed: _Timed, ran: _Ran, gradients: dict[str, torch.Tensor]) -> None:
        pairs = zip(timed.stage.passes, ran.outputs, strict=True)
        roots = {n: x for n, x in pairs if x.requires_grad and n in gradients}
        names = (*timed.stage.receives, *timed.stage.loads)
        wanted = {n: x for n, x in zip(names, ran.inputs, strict=True) if x.requires_grad}
        if not roots or not (wanted or timed.parameters):
            timed.backward.append(0.0)
            return
        begin = self._now()
        found = torch.autograd.grad(
            [*roots.values()],
            [*wanted.values(), *timed.parameters],
            [gradients.pop(name) for name in roots],
            allow_unused=True,
        )
        timed.backward.append(self._now() - begin)
        _add(gradients, [*wanted], found[: len(wanted)])

    def _leaves(
        self, stage: StageModule, tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Tensors that a layer reads; those with a gradient in the whole model require one here."""
        names = (*stage.receives, *stage.loads)
        return tuple(tensors[n].detach().requires_grad_(self._facts[n].needs_grad) for n in names)

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


def _timed(traced: TracedModel, layer: TracedLayer) -> _Timed:
    name = (layer.name,)
    loads = tuple(source for source in layer.sources if traced.by_name[source].is_input)
    receives = tuple(source for source in layer.sources if source not in loads)
    part = Part((), (), name, name) if layer.is_input else Part(name, receives, loads, name)
    stage = build_stage(traced, part, is_last=False)
    return _Timed(stage, tuple(p for p in stage.parameters() if p.requires_grad))


def _add(
    gradients: dict[str, torch.Tensor],
    names: Sequence[str],
    found: Sequence[torch.Tensor | None],
) -> None:
    for name, gradient in zip(names, found, strict=True):
        if gradient is not None:
            so_far = gradients.get(name)
            gradients[name] = gradient if so_far is None else so_far + gradient


def _graph(traced: TracedModel, sweeps: _Sweeps, memory: Mapping[str, LayerMemory]) -> LayerGraph:
    sizes = {name: parameter.nbytes for name, parameter in traced.model.named_parameters()}
    layers = []
    for layer in traced.layers:
        timed = [sweeps.layers[layer.name]] if layer.name in sweeps.layers else []
        if layer is traced.layers[-1]:
            timed.append(sweeps.loss)
        if layer.is_input:
            timed = []
        layers.append(
            Layer(
                name=layer.name,
                forward_seconds=math.fsum(_median(one.forward) for one in timed),
                backward_seconds=math.fsum(_median(one.backward) for one in timed),
                activation_bytes=layer.value.num_bytes if layer.value is not None else 0,
                parameter_bytes=sum(sizes.pop(name, 0) for name in layer.parameters),
                description=layer.description,
                gradient_bytes=_gradient_bytes(layer),
                memory=memory.get(layer.name),
            )
        )
    tied = dict.fromkeys(one.layers for one in traced.tied)
    return LayerGraph(tuple(layers), traced.edges, tuple(tied))


def _gradient_bytes(layer: TracedLayer) -> int:
    """Bytes of the gradient that comes back for a layer's output."""
    tensors = layer.value.tensors if layer.value is not None else ()
    return sum(tensor.num_bytes for tensor in tensors if tensor.needs_grad)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) if seconds else 0.0


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError("with a loss_fn the batch is a pair: (inputs, targets)")
    return batch[0], batch[1]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise InputError("loss_fn must give a tensor of one number: take the mean")
    if not loss.requires_grad:
        raise InputError("no gradient leads from the loss to the outputs: do not detach them")


def _waiter(model: nn.Module) -> Callable[[], None]:
    """Function that waits until the model's devices have finished all their work."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait
