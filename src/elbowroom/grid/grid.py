"""Training of a model on a grid of workers: each layer split as a plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from elbowroom.core.errors import InputError
from elbowroom.grid.call import Draws
from elbowroom.grid.checkpoint import GridState
from elbowroom.grid.clipping import clip_gradients
from elbowroom.grid.interpreter import GridModel, run_forward
from elbowroom.grid.losses import GridLoss, LossFunction
from elbowroom.grid.options import GridOptions
from elbowroom.grid.transport import Channel, ProcessTransport, Transport
from elbowroom.grid.weight_parts import weight_uses
from elbowroom.grid.weights import Weights
from elbowroom.plans.grid import GridPlan
from elbowroom.plans.grid_placement import place
from elbowroom.training.checkpoint import Checkpoint, newest_of_run
from elbowroom.training.checkpoint_content import (
    aliases_of,
    check_settings,
    kept_buffers,
    note_made,
)
from elbowroom.training.layers import trace_model
from elbowroom.training.loop import check_optimizer, check_scheduler
from elbowroom.training.operations.find import operations_of, shapes_of
from elbowroom.training.outcome import in_training
from elbowroom.training.sameness import check_same_batches, make_equal
from elbowroom.training.script import OptimizerFunction

SchedulerFunction = Callable[[torch.optim.Optimizer], LRScheduler]
"""Makes the scheduler of the optimizer."""

_SLICED_BADLY = ("Muon", "Adafactor", "LAMB", "Lamb", "LARS", "Shampoo", "SOAP")
"""Optimizers whose update of an element depends on others of its parameter."""


class _Built(NamedTuple):
    """What a worker can only make once the first minibatch has been traced."""

    model: GridModel
    weights: Weights
    loss: GridLoss
    state: GridState
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None


class Grid:
    """One worker's part of a model on a grid.

    All workers give the same model, with the same weights, and every minibatch whole, of which each
    takes its part. The model is taken over: slices of its weights replace them.

    Args:
        model: what ``torch.fx`` or ``torch.export`` can trace.
        plan: for as many workers as there are, with grids of this model's layers.
        optimizer_fn: makes an optimizer of parameters, slices among them.
        loss_fn: from the model's outputs and the targets to a tensor of one number.
        options: see ``GridOptions``.
        scheduler_fn: makes a scheduler of the optimizer; it steps after every update.
        transport: to the other workers; None for torch's default process group.

    Raises InputError for a plan of another number of workers; the first ``train_step`` raises it
    for a plan of another model, and UntraceableModelError.

    """

    def __init__(
        self,
        model: nn.Module,
        plan: GridPlan,
        optimizer_fn: OptimizerFunction,
        loss_fn: LossFunction,
        options: GridOptions | None = None,
        scheduler_fn: SchedulerFunction | None = None,
        transport: Transport | None = None,
    ) -> None:
        options = options or GridOptions()
        self.channel = Channel(transport or ProcessTransport(), keeps_record=options.keeps_record)
        if self.channel.num_workers != plan.procs:
            raise InputError(
                f"the plan is for {plan.procs} workers, and there are {self.channel.num_workers}: "
                f"start as many (torchrun --nproc-per-node), or plan again"
            )
        if options.autocast is not None and any(layer.workers for layer in plan.layers):
            raise InputError(
                "autocast is not for plans that give layers to some of the workers: the others "
                "would not know in which type tensors come. Leave it out, or make another plan"
            )
        self.plan = plan
        self.worker = self.channel.worker
        self.num_done = 0
        self._options = options
        self._is_alone = transport is not None
        self._model, self._loss_fn = model, loss_fn
        self._optimizer_fn, self._scheduler_fn = optimizer_fn, scheduler_fn
        self._built: _Built | None = None
        self._resumed: Checkpoint | None = None

    @property
    def weights(self) -> Weights:
        """Parameters of this worker. Raises InputError before the first ``train_step``."""
        return self._ready().weights

    def prepare(self, batch: tuple[Any, Any]) -> None:
        """Trace the model with a minibatch, and keep this worker's part of it; trains nothing.

        Or else ``train_step`` does it with its first. Raises InputError for a plan of another
        model, and UntraceableModelError.
        """
        assert self._built is None, "the model is prepared once"
        if not self._is_alone:
            if self._resumed is None:
                make_equal(self._model)
            check_same_batches([batch])
        self._built = self._build(batch[0])

    def train_step(self, batch: tuple[Any, Any]) -> float:
        """Train with inputs and targets; gives the loss, the same on every worker.

        Every worker is given every minibatch, in the same order. Raises InputError for a minibatch
        that does not fit the plan, PeerLostError when a worker is gone.
        """
        inputs, targets = batch
        if self._built is None:
            self.prepare(batch)
        built, channel = self._ready(), self.channel
        channel.begin_step()
        model = built.model
        model.traced.named_inputs(inputs)
        draws = Draws(self._options.seed, self.num_done, self._options.exact_randomness)
        values = model.traced.graph.placeholder_values(inputs)
        dtype = self._options.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            results = run_forward(model, values, built.weights, channel, draws)
            shared = built.loss.share(model, results, targets)
        shared.share.backward()  # type: ignore[no-untyped-call]
        built.weights.sums.finish()
        loss = built.loss.total(shared)
        self._update(built)
        return loss

    def restore(self, folder: Path) -> int:
        """Resume from the newest whole checkpoint of a folder, before the first ``train_step``.

        Gives the number of minibatches that it was trained with; 0 if there is none. It may be of
        any grid, or of a pipeline. Raises InputError, here or with the first step, if it does not
        fit.
        """
        self._resumed = newest_of_run(folder, self._options.seed)
        self.num_done = self._resumed.index.steps if self._resumed else 0
        return self.num_done

    def save(self, folder: Path) -> Path:
        """Write a checkpoint; every worker must call it. Raises OutputError, PeerLostError.

        Raises InputError before the first step, and for an optimizer whose state of a slice has
        another shape.
        """
        return self._ready().state.save(folder, self.num_done, {"seed": self._options.seed})

    def close(self) -> None:
        """Wait until all that was sent has left.

        A profiler of torch has to end after this: torch 2.13 notes the end of each message in the
        profiler's memory, also when that has been freed.
        """
        self.channel.transport.drain()

    def _update(self, built: _Built) -> None:
        if self._options.clip_norm is not None:
            clip_gradients(built.weights, self._options.clip_norm, self.channel)
        built.optimizer.step()
        if built.scheduler is not None:
            built.scheduler.step()
        built.optimizer.zero_grad()
        self.num_done += 1

    def _ready(self) -> _Built:
        if self._built is None:
            raise InputError("the first train_step makes the worker's weights: there are none yet")
        return self._built

    def _build(self, inputs: Any) -> _Built:
        traced = trace_model(in_training(self._model), inputs, leaves=True)
        operations = operations_of(traced)
        shapes = shapes_of(traced, operations)
        placements = place(shapes, self.plan)
        model = GridModel(traced, operations, shapes, placements)
        named = (*self._model.named_parameters(), *self._model.named_buffers())
        sizes = {name: tuple(tensor.shape) for name, tensor in named}
        uses = [
            use
            for operation in operations
            for use in weight_uses(operation, placements[operation.shape.name], sizes)
        ]
        weights = Weights(self._model, uses, self.channel)
        optimizer = self._optimizer_fn([p for p in weights.parameters.values() if p.requires_grad])
        _check_optimizer(optimizer, weights.slices)
        note_made(optimizer)
        scheduler = self._scheduler_fn(optimizer) if self._scheduler_fn else None
        check_scheduler(scheduler)
        names = {one: name for name, one in weights.parameters.items()}
        check_settings(names, optimizer, scheduler)
        kept = frozenset(kept_buffers(self._model))
        state = GridState(weights, kept, optimizer, scheduler, self.channel)
        if self._resumed is not None:
            state.load(self._resumed, aliases_of(self._model))
        loss = GridLoss(self._loss_fn, self._options.loss, self.channel)
        return _Built(model, weights, loss, state, optimizer, scheduler)


def _check_optimizer(optimizer: torch.optim.Optimizer, slices: Iterable[str]) -> None:
    """Raise InputError for an optimizer that needs whole parameters, where there are slices."""
    check_optimizer(optimizer)
    name = type(optimizer).__name__
    sliced = next(iter(slices), None)
    if sliced is not None and name in _SLICED_BADLY:
        raise InputError(
            f"{name} updates an element by others of its parameter, and '{sliced}' is split over "
            f"workers: take another optimizer, or a plan without features split"
        )
