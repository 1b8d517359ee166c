"""What one worker does for each action of its schedule: a method for each kind, and their table.

PipeDream: arXiv 1806.03377 section 3; SOSP 2019 section 3. Which action comes when is decided in
``plans.pipeline_schedule``; here is only how it is carried out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from elbowroom.pipeline.clipping import clipped, norm_of, norm_of_stages
from elbowroom.pipeline.links import Connection, TensorMessage
from elbowroom.pipeline.options import LossFunction, StageOptions
from elbowroom.pipeline.replicas import Replicas
from elbowroom.pipeline.versions import HORIZON, Leaves, Versions
from elbowroom.plans.pipeline import Semantics
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    PipelineAction,
    RecvActivation,
    RecvGradient,
    Reduce,
    SendActivation,
    SendGradient,
    Update,
)
from elbowroom.plans.pipeline_schedule import ActionStream
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.training.keeping import Keeper
from elbowroom.training.outcome import seed_minibatch

Tensors = tuple[torch.Tensor, ...]
DoneKind = Literal["forward", "backward", "reduce", "update"]


class Done(NamedTuple):
    """One action that computed: seconds on ``time.perf_counter``, the weights by their version."""

    kind: DoneKind
    minibatch: int
    version: int
    begin: float
    end: float


class Batch(NamedTuple):
    """A stage's own inputs of a minibatch or microbatch, and the targets.

    ``share`` is the part of its minibatch's mean that its loss stands for.
    """

    inputs: Tensors
    targets: object
    share: float


@dataclass(frozen=True)
class _Flight:
    """A minibatch between its forward and its backward."""

    version: int
    leaves: Leaves
    inputs: Tensors
    outputs: Tensors | tuple[GradientEdge, ...]
    """Tensors until they are sent; then, with a keeper, their places in the graph alone."""
    message: TensorMessage | None
    share: float


class StageActions:
    """The state of one worker's stage, and a method for each action that changes it.

    ``stream`` is where the worker's actions come from. ``batches`` are filled before a forward and
    taken by it; ``losses`` are there after a forward of the last stage, by minibatch.
    """

    def __init__(
        self,
        module: nn.Module,
        pipe: Pipe,
        worker: int,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        options: StageOptions,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        stream: ActionStream,
        depth: int,
        keeper: Keeper | None = None,
    ) -> None:
        self.batches: dict[int, Batch] = {}
        self.losses: dict[int, float] = {}
        self.done: list[Done] = []
        self.busy_seconds = 0.0
        self._module = module
        self._pipe = pipe
        self._stage = stage = stream.stage
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._loss_fn = loss_fn
        self._options = options
        self._semantics: Semantics = options.semantics or "stash"
        self._is_flushed = options.semantics == "flush"
        self._stream = stream
        self._depth = depth
        self._keeper = keeper
        self.versions = Versions(module, self._semantics)
        self._before = self._connect(stage - 1, num_kept=stream.warmup_forwards + 1)
        self._behind = self._connect(stage + 1, num_kept=1)
        self.links = [link for link in (self._before, self._behind) if link is not None]
        self.replicas = Replicas(
            pipe.workers(stage), worker, self.versions.trained, options.bucket_bytes
        )
        self._received: dict[int, TensorMessage] = {}
        self._flights: dict[int, _Flight] = {}
        self._returned: dict[int, list[torch.Tensor]] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._num_gathered = 0

    def recv_activation(self, action: RecvActivation) -> None:
        """Wait for the inputs that the stage before computed."""
        assert self._before is not None, "the first stage receives no activations"
        self._received[action.minibatch] = self._before.receive(action.minibatch)

    def forward(self, action: Forward) -> None:
        """Compute the outputs, and keep what the backward needs."""
        minibatch = action.minibatch
        batch, message = self.batches.pop(minibatch), self._received.pop(minibatch, None)
        inputs, version = batch.inputs, self._forward_version(minibatch)
        if message is not None:
            inputs = (*map(_as_leaf, message.tensors, message.needs_grad), *inputs)
        begin = time.perf_counter()
        leaves = self.versions.acquire(version)
        held = (*leaves.values(), *self._module.buffers(), *inputs)
        with (
            self._keeping(minibatch, held),
            self._randomness(minibatch),
            self._options.computing(),
        ):
            outputs = functional_call(self._module, dict(leaves), inputs)
            if self._behind is None:
                outputs = (self._loss_fn(outputs, batch.targets),)
        self._flights[minibatch] = _Flight(version, leaves, inputs, outputs, message, batch.share)
        self._note("forward", minibatch, version, begin)
        if self._behind is None:
            self.losses[minibatch] = float(outputs[0].detach())

    def send_activation(self, action: SendActivation) -> None:
        """Begin to send the outputs to the next stage."""
        assert self._behind is not None, "the last stage sends no activations"
        flight = self._flights[action.minibatch]
        outputs = tuple(one for one in flight.outputs if isinstance(one, torch.Tensor))
        self._behind.send(action.minibatch, outputs)
        if self._keeper is not None:
            edges = tuple(get_gradient_edge(one) for one in outputs if one.requires_grad)
            self._flights[action.minibatch] = replace(flight, outputs=edges)

    def recv_gradient(self, action: RecvGradient) -> None:
        """Wait for the gradients of the outputs."""
        assert self._behind is not None, "the last stage receives no gradients"
        if self._keeper is not None:
            self._keeper.returns(action.minibatch)
        self._received[action.minibatch] = self._behind.receive(action.minibatch)

    def backward(self, action: Backward) -> None:
        """Compute gradients: those of weights are added up, those of inputs kept to be sent.

        All else that the minibatch kept is let go.
        """
        minibatch = action.minibatch
        flight, message = self._flights.pop(minibatch), self._received.pop(minibatch, None)
        outputs: list[Any] = [one for one in flight.outputs if _has_gradient(one)]
        if message is not None:
            given = list(message.tensors)
        else:
            given = [torch.full_like(loss, flight.share) for loss in outputs]
        begin = time.perf_counter()
        inputs = [tensor for tensor in flight.inputs if tensor.requires_grad]
        leaves = {name: flight.leaves[name] for name in self.versions.trained}
        wanted = [*inputs, *leaves.values()]
        if not self._is_flushed:
            self.replicas.tell(1)
        with self.replicas.watch({} if self._is_flushed else leaves):
            found = torch.autograd.grad(outputs, wanted, given, allow_unused=True) if wanted else ()
        self._gather(dict(zip(leaves, found[len(inputs) :], strict=True)))
        self.versions.release(flight.version)
        if self._keeper is not None:
            self._keeper.end(minibatch)
        self._note("backward", minibatch, flight.version, begin)
        self._give_back(flight, message, found)
        if self._before is not None:
            self._returned[minibatch] = [
                torch.zeros_like(tensor) if grad is None else grad
                for tensor, grad in zip(inputs, found, strict=False)
            ]

    def send_gradient(self, action: SendGradient) -> None:
        """Begin to send the gradients of the inputs, once there is room for them."""
        assert self._before is not None, "the first stage sends no gradients"
        self._before.wait_until_sent(but=self._depth - 1)  # a plan counts ``depth``
        self._before.send(action.minibatch, self._returned.pop(action.minibatch))

    def reduce(self, action: Reduce) -> None:
        """All-reduce the gradients of a round: their mean over its minibatches.

        With ``flush`` their sum: each is that of a part of a minibatch's mean already.
        """
        begin = time.perf_counter()
        if not self._is_flushed and not self._num_gathered:
            self.replicas.tell(0)
        self._gradients = self.replicas.all_reduce(self._gradients)
        self._note("reduce", action.minibatch, self.versions.newest, begin)

    def update(self, action: Update) -> None:
        """Make a new version of the weights from the gradients gathered since the last one."""
        begin = time.perf_counter()
        gradients = self._clip(self._gradients)
        self._gradients, self._num_gathered = {}, 0
        oldest_needed = None
        if self._semantics == "vertical-sync":
            oldest_needed = self._forward_version(self._stream.next_own_minibatch)
        missing = len(self._flights)  # updates, before that of the next minibatch
        ahead = HORIZON * missing if self._semantics == "predict" else 0
        self.versions.step(self._optimizer, gradients, oldest_needed, ahead)
        if self._scheduler is not None:
            self._scheduler.step()
        self._note("update", action.minibatch, self.versions.newest, begin)

    def _connect(self, stage: int, num_kept: int) -> Connection | None:
        """A connection to the workers of a stage, if there is one."""
        workers = self._pipe.workers(stage)
        stride = self._pipe.replicas[self._stage]
        return Connection(workers, stride, self._depth, num_kept + self._depth) if workers else None

    def _forward_version(self, minibatch: int) -> int:
        """The version of the weights that the next forward here uses, which is the minibatch's."""
        if self._semantics == "vertical-sync":
            return self._stream.input_version(minibatch)
        return self.versions.newest

    def _give_back(
        self, flight: _Flight, message: TensorMessage | None, found: Sequence[torch.Tensor | None]
    ) -> None:
        """Reuse the memory of received tensors, unless a gradient that is still needed lies there.

        ``flight.message`` brought the activations, ``message`` the gradients.
        """
        if self._before is not None and flight.message is not None:
            self._before.give_back(flight.message)
        if self._behind is not None and message is not None:
            used = {_memory(grad) for grad in found if grad is not None}
            if used.isdisjoint(map(_memory, message.tensors)):
                self._behind.give_back(message)

    def _gather(self, gradients: Mapping[str, torch.Tensor | None]) -> None:
        """Add the gradients of one minibatch to those since the last update."""
        self._num_gathered += 1
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if name in self._gradients:
                self._gradients[name] = self._gradients[name] + gradient
            else:
                self._gradients[name] = gradient

    def _clip(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        limit = self._options.clip_norm
        if limit is None:
            return gradients
        norm = norm_of(gradients)
        if self._is_flushed:
            return clipped(gradients, norm_of_stages(norm, self._pipe), limit)
        return clipped(gradients, norm, limit / sqrt(self._pipe.num_stages))

    @contextmanager
    def _keeping(self, minibatch: int, held: Iterable[torch.Tensor]) -> Iterator[None]:
        """Have what a forward saves kept by the keeper, if there is one, but for what we hold."""
        if self._keeper is None:
            yield
            return
        with self._keeper.forward(minibatch):
            self._keeper.stays(minibatch, held)
            yield

    @contextmanager
    def _randomness(self, minibatch: int) -> Iterator[None]:
        """Draw the same numbers for a stage and a minibatch wherever and whenever they meet."""
        state = torch.get_rng_state()
        seed_minibatch(self._options.seed, self._stage, minibatch)
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def _note(self, kind: DoneKind, minibatch: int, version: int, begin: float) -> None:
        """Count what just ended, and keep it if a record is kept."""
        end = time.perf_counter()
        self.busy_seconds += end - begin
        if self._options.keeps_record:
            self.done.append(Done(kind, minibatch, version, begin, end))


HANDLERS: Mapping[type[PipelineAction], Callable[[StageActions, Any], None]] = {
    RecvActivation: StageActions.recv_activation,
    Forward: StageActions.forward,
    SendActivation: StageActions.send_activation,
    RecvGradient: StageActions.recv_gradient,
    Backward: StageActions.backward,
    SendGradient: StageActions.send_gradient,
    Reduce: StageActions.reduce,
    Update: StageActions.update,
}
"""One handler for each action that a schedule may have."""


def _memory(tensor: torch.Tensor) -> int:
    """The address of what holds a tensor's numbers, also of a sparse one."""
    return (tensor._values() if tensor.is_sparse else tensor).untyped_storage().data_ptr()


def _has_gradient(output: torch.Tensor | GradientEdge) -> bool:
    return not isinstance(output, torch.Tensor) or output.requires_grad


def _as_leaf(tensor: torch.Tensor, needs_grad: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(needs_grad)
