"""One worker of a pipeline: runs its stage on minibatch after minibatch, one forward, one backward.

PipeDream: arXiv 1806.03377 section 3; SOSP 2019 section 3. Every worker is told of every minibatch
and does what is its own: a call of ``train_step`` feeds one minibatch into the pipe and none waits
for it to come back; ``drain`` lets all come back. With ``flush`` weights, each call feeds
microbatches, drains the pipe and updates once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from elbowroom.core.errors import InputError
from elbowroom.pipeline.clipping import clipped, norm_of, norm_of_stages
from elbowroom.pipeline.links import Connection, TensorMessage
from elbowroom.pipeline.replicas import Replicas
from elbowroom.pipeline.versions import HORIZON, Leaves, Versions
from elbowroom.plans.pipeline import Semantics
from elbowroom.plans.pipeline_shape import BUCKET_BYTES, Pipe

Tensors = tuple[torch.Tensor, ...]
LossFunction = Callable[[Any, Any], torch.Tensor]
"""Of what the last stage gives and the targets: a mean over the minibatch."""


class Done(NamedTuple):
    """One pass, as it was: seconds on ``time.perf_counter``, the weights by their number."""

    kind: Literal["forward", "backward", "update"]
    minibatch: int
    version: int
    begin: float
    end: float


class _Drained(NamedTuple):
    """When the pipe was last empty: the next minibatch, and the newest version."""

    minibatch: int
    version: int


@dataclass
class _Flight:
    """A minibatch between its forward and its backward."""

    minibatch: int
    version: int
    leaves: Leaves
    inputs: Tensors
    outputs: Tensors
    message: TensorMessage | None


@dataclass(frozen=True)
class StageOptions:
    """How a pipeline trains.

    Args:
        semantics: of the weights' versions, see ``versions``. None: the plan's; without one
            ``stash``.
        microbatches: of which a minibatch is made with ``flush``; 1 otherwise.
        seed: of dropout and other randomness, with the stage and the minibatch.
        autocast: compute in this type where ``torch.autocast`` does.
        keeps_record: of every pass, in ``StageWorker.done``.
        clip_norm: the most that the norm of the gradients over all stages may be, as of
            ``torch.nn.utils.clip_grad_norm_``. With ``flush`` it is that norm. Otherwise no stage
            knows the others' in time, and of n stages each is clipped to clip_norm / sqrt(n), so
            that all together never exceed it. Of replicas it is the norm of their mean.
        bucket_bytes: of gradients that replicas send while they still compute others.

    Raises InputError for microbatches where a minibatch is not made of any, and for a norm or
    buckets of nothing.

    """

    semantics: Semantics | None = None
    microbatches: int = 1
    seed: int = 0
    autocast: torch.dtype | None = None
    keeps_record: bool = False
    clip_norm: float | None = None
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        if self.microbatches < 1 or (self.microbatches > 1 and self.semantics != "flush"):
            semantics = f"'{self.semantics}'" if self.semantics else "of the plan"
            raise InputError(
                f"{self.microbatches} microbatches with semantics {semantics}: give 1, or more "
                "with 'flush'"
            )
        if self.bucket_bytes < 1 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise InputError(
                f"clip_norm {self.clip_norm}, bucket_bytes {self.bucket_bytes}: give more than 0"
            )


class StageWorker:
    """Worker number ``worker`` of ``pipe``. Needs a process group of all workers.

    ``stage`` takes the tensors that the stage before it gives, then its own inputs, and gives a
    tuple of tensors; what the last stage gives goes to ``loss_fn``. ``scheduler`` steps after every
    update. Minibatches are numbered from ``next_minibatch``; ``depth`` is that of the plan.
    """

    def __init__(
        self,
        stage: nn.Module,
        pipe: Pipe,
        worker: int,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        options: StageOptions | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        next_minibatch: int = 0,
        depth: int = 1,
    ) -> None:
        self.stage = stage
        self.number = pipe.stages[worker]
        self.done: list[Done] = []
        self.busy_seconds = 0.0
        self._pipe = pipe
        self._depth = depth
        self._warmup = pipe.warmup_forwards(self.number, depth)
        self._replica = worker - pipe.workers(self.number)[0]
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._loss_fn = loss_fn
        self._options = options or StageOptions()
        self._semantics: Semantics = self._options.semantics or "stash"
        self.versions = Versions(stage, self._semantics)
        self._before = self._link(self.number - 1, num_kept=self._warmup + 1)
        self._behind = self._link(self.number + 1, num_kept=1)
        self._links = [link for link in (self._before, self._behind) if link is not None]
        self._replicas = Replicas(
            pipe.workers(self.number), worker, self.versions.trained, self._options.bucket_bytes
        )
        self._flights: deque[_Flight] = deque()
        self._gradients: dict[str, torch.Tensor] = {}
        self._num_fed = next_minibatch
        self._begin_rounds()

    @property
    def next_minibatch(self) -> int:
        """The number of the next one to be fed, by which randomness is keyed."""
        return self._num_fed

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Of tensors, to each other worker: activations, gradients of them and of weights."""
        sent = dict(self._replicas.sent_bytes)
        for link in self._links:
            sent |= link.sent_bytes
        return sent

    @property
    def buffer_bytes(self) -> int:
        """Where other threads receive."""
        of_links = sum(link.buffer_bytes for link in self._links)
        return of_links + self._replicas.buffer_bytes

    def train_step(self, inputs: Sequence[torch.Tensor], targets: object = None) -> float | None:
        """Feed one minibatch; every worker must be called with every one, in the same order.

        ``inputs`` are those of this stage, beside what it receives; only the last one reads
        ``targets``. Gives the loss where the last stage has run the minibatch, else None; with
        ``flush``, of the microbatches run here.
        """
        inputs = tuple(tensor.detach() for tensor in inputs)
        if self._semantics != "flush":
            return self._feed(inputs, targets)
        count = self._options.microbatches
        parts = [_split(tensor, count) for tensor in inputs]
        aims = _split(targets, count) if isinstance(targets, torch.Tensor) else [targets] * count
        losses = [self._feed(tuple(part[n] for part in parts), aims[n]) for n in range(count)]
        self._bring_back()
        self._update()
        here = [loss for loss in losses if loss is not None]
        return sum(here) / len(here) if here else None

    def drain(self) -> None:
        """Let all minibatches come back. Every worker must call it; then training may go on."""
        self._bring_back()
        replicas = self._pipe.replicas[self.number]
        begun = self._num_fed // replicas * replicas
        if self._semantics != "flush" and begun + self._replica >= self._num_fed > begun:
            self._replicas.tell(0)  # the others of the last round wait for us
            self._update()
        self._begin_rounds()

    def close(self) -> None:
        """End the channels, after ``drain``. Every worker must call it."""
        self._replicas.close()
        for link in self._links:
            link.close()

    def _link(self, stage: int, num_kept: int) -> Connection | None:
        """To the workers of a stage, if there is one."""
        workers = self._pipe.workers(stage)
        stride = self._pipe.replicas[self.number]
        return Connection(workers, stride, self._depth, num_kept + self._depth) if workers else None

    def _begin_rounds(self) -> None:
        """Nothing is on its way: all stages begin their next rounds with the same minibatch."""
        whole = lcm(*self._pipe.replicas)
        self._num_fed = -(-self._num_fed // whole) * whole
        self._drained_at = _Drained(self._num_fed, self.versions.newest)

    def _version(self, minibatch: int) -> int:
        """Of the weights that a forward uses, which is the next one here.

        With ``vertical-sync``, the newest that counts no minibatch which the first stage's newest
        does not count: a replica there has updated after each of its forwards but the first few.
        """
        if self._semantics != "vertical-sync":
            return self.versions.newest
        first, here = self._pipe.replicas[0], self._pipe.replicas[self.number]
        begun = (minibatch - self._drained_at.minibatch) // first
        rounds = max(0, begun - self._pipe.warmup_forwards(0, self._depth))
        return self._drained_at.version + rounds * first // here

    def _feed(self, inputs: Tensors, targets: object) -> float | None:
        minibatch = self._num_fed
        self._num_fed += 1
        if minibatch % self._pipe.replicas[self.number] != self._replica:
            return None
        loss = self._forward(minibatch, inputs, targets)
        if len(self._flights) > self._warmup:
            self._return_oldest()
        return loss

    def _bring_back(self) -> None:
        while self._flights:
            self._return_oldest()

    def _return_oldest(self) -> None:
        """Backward, and what the minibatch kept is let go before weights are updated."""
        self._backward(self._flights.popleft())
        if self._semantics != "flush":
            self._update()

    def _forward(self, minibatch: int, inputs: Tensors, targets: object) -> float | None:
        version, message = self._version(minibatch), None
        if self._before is not None:
            message = self._before.receive(minibatch)
            inputs = (*map(_as_leaf, message.tensors, message.needs_grad), *inputs)
        begin = time.perf_counter()
        leaves = self.versions.acquire(version)
        with self._randomness(minibatch), self._autocast():
            outputs = functional_call(self.stage, dict(leaves), inputs)
            if self._behind is None:
                outputs = (self._loss_fn(outputs, targets),)
        flight = _Flight(minibatch, version, leaves, inputs, outputs, message)
        self._flights.append(flight)
        self._note(Done("forward", minibatch, version, begin, time.perf_counter()))
        if self._behind is None:
            return float(outputs[0].detach())
        self._behind.send(minibatch, outputs)
        return None

    def _backward(self, flight: _Flight) -> None:
        """Gradients of a minibatch: its inputs' go to the stage before, its weights' are kept."""
        message = None
        outputs = [tensor for tensor in flight.outputs if tensor.requires_grad]
        if self._behind is not None:
            message = self._behind.receive(flight.minibatch)
            given = list(message.tensors)
        else:
            given = [torch.full_like(loss, 1 / self._options.microbatches) for loss in outputs]
        begin = time.perf_counter()
        inputs = [tensor for tensor in flight.inputs if tensor.requires_grad]
        leaves = {name: flight.leaves[name] for name in self.versions.trained}
        wanted = [*inputs, *leaves.values()]
        is_round = self._semantics != "flush"
        if is_round:
            self._replicas.tell(1)
        with self._replicas.watch(leaves if is_round else {}):
            found = torch.autograd.grad(outputs, wanted, given, allow_unused=True) if wanted else ()
        self._add(dict(zip(leaves, found[len(inputs) :], strict=True)))
        self.versions.release(flight.version)
        end = time.perf_counter()
        self._note(Done("backward", flight.minibatch, flight.version, begin, end))
        self._give_back(flight, message, found)
        if self._before is not None:
            back = [
                torch.zeros_like(tensor) if grad is None else grad
                for tensor, grad in zip(inputs, found, strict=False)
            ]
            self._before.wait_until_sent(but=self._depth - 1)  # a plan counts ``depth``
            self._before.send(flight.minibatch, back)

    def _give_back(
        self, flight: _Flight, message: TensorMessage | None, found: Sequence[torch.Tensor | None]
    ) -> None:
        """Memory of what was received, unless a gradient that is still needed lies in it."""
        if self._before is not None and flight.message is not None:
            self._before.give_back(flight.message)
        if self._behind is not None and message is not None:
            used = {grad.untyped_storage().data_ptr() for grad in found if grad is not None}
            if used.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in message.tensors):
                self._behind.give_back(message)

    def _add(self, gradients: dict[str, torch.Tensor | None]) -> None:
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if name in self._gradients:
                self._gradients[name] = self._gradients[name] + gradient
            else:
                self._gradients[name] = gradient

    def _update(self) -> None:
        """A new version, from what was gathered here and by the other replicas of the stage."""
        begin = time.perf_counter()
        gradients = self._clip(self._replicas.all_reduce(self._gradients))
        self._gradients = {}
        replicas = self._pipe.replicas[self.number]
        upcoming = self._num_fed + (self._replica - self._num_fed) % replicas
        is_synced = self._semantics == "vertical-sync"
        oldest_needed = self._version(upcoming) if is_synced else None
        missing = len(self._flights)  # updates, before that of the next minibatch
        ahead = HORIZON * missing if self._semantics == "predict" else 0
        self.versions.step(self._optimizer, gradients, oldest_needed, ahead)
        if self._scheduler is not None:
            self._scheduler.step()
        self._note(Done("update", self._num_fed, self.versions.newest, begin, time.perf_counter()))

    def _clip(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        limit = self._options.clip_norm
        if limit is None:
            return gradients
        norm = norm_of(gradients)
        if self._semantics == "flush":
            return clipped(gradients, norm_of_stages(norm, self._pipe), limit)
        return clipped(gradients, norm, limit / sqrt(self._pipe.num_stages))

    @contextmanager
    def _randomness(self, minibatch: int) -> Iterator[None]:
        """The same for a stage and a minibatch wherever and whenever they meet."""
        state = torch.get_rng_state()
        key = np.random.SeedSequence((self._options.seed, self.number, minibatch))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def _autocast(self) -> torch.autocast:
        dtype = self._options.autocast
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    def _note(self, done: Done) -> None:
        self.busy_seconds += done.end - done.begin
        if self._options.keeps_record:
            self.done.append(done)


def _as_leaf(tensor: torch.Tensor, needs_grad: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(needs_grad)


def _split(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Raises InputError where a minibatch cannot be cut into equal microbatches."""
    if len(tensor) % count:
        raise InputError(
            f"a minibatch of {len(tensor)} is not {count} equal microbatches: drop the last, or "
            f"choose another number"
        )
    return list(tensor.chunk(count))
