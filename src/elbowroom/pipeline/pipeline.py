"""``Pipeline``: a model in stages on the workers of a process group, minibatch after minibatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from elbowroom.core.errors import InputError
from elbowroom.pipeline.checkpoint import Checkpoint, newest_checkpoint, save
from elbowroom.pipeline.options import LossFunction, StageOptions
from elbowroom.pipeline.split import split
from elbowroom.pipeline.stage_actions import Done
from elbowroom.pipeline.versions import Semantics
from elbowroom.pipeline.worker import StageWorker
from elbowroom.plans.pipeline import PipelinePlan
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.training.layers import trace_model
from elbowroom.training.script import OptimizerFunction
from elbowroom.training.stage import StageModule
from elbowroom.training.traced import TracedModel

SchedulerFunction = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Pipeline:
    """A worker's part of a pipeline: that of its rank in the default process group.

    All workers give the same model, with the same weights. It is taken over: each keeps the weights
    of its own stage, which are trained, and lets those of the others go.

    Args:
        model: what ``torch.fx`` or ``torch.export`` can trace, or an ``nn.Sequential``.
        plan: as many workers as the process group has, stages of this model's layers.
        optimizer_fn: of the parameters of a stage, such as ``partial(torch.optim.AdamW, lr=1e-3)``.
        loss_fn: of the model's outputs and the targets, a mean over a minibatch.
        options: see ``StageOptions``.
        scheduler_fn: of the optimizer; it steps after every update of the stage.

    Raises InputError for a plan of another number of workers; the first ``train_step`` raises
    SplitError for one of another model, and UntraceableModelError.

    """

    def __init__(
        self,
        model: nn.Module,
        plan: PipelinePlan,
        optimizer_fn: OptimizerFunction,
        loss_fn: LossFunction,
        options: StageOptions | None = None,
        scheduler_fn: SchedulerFunction | None = None,
    ) -> None:
        size = distributed.get_world_size()
        if size != plan.num_workers:
            raise InputError(
                f"the plan {plan} is for {plan.num_workers} workers, and there are {size}: start "
                f"as many (torchrun --nproc-per-node), or plan again"
            )
        self.pipe = Pipe(plan.replicas)
        self.number = distributed.get_rank()
        self._model = model
        self.plan = plan
        self._optimizer_fn = optimizer_fn
        self._scheduler_fn = scheduler_fn
        self._loss_fn = loss_fn
        options = options or StageOptions()
        self.semantics: Semantics = options.semantics or plan.options.semantics
        self._options = replace(options, semantics=self.semantics)
        self._traced: TracedModel
        self._stage: StageModule
        self._optimizer: torch.optim.Optimizer
        self._scheduler: torch.optim.lr_scheduler.LRScheduler | None
        self._worker: StageWorker | None = None
        self._resumed: Checkpoint | None = None
        self._num_steps = 0

    @property
    def stage_number(self) -> int:
        return self.pipe.stages[self.number]

    @property
    def stage(self) -> StageModule:
        """The module that this worker trains. Made by the first ``train_step``."""
        return self._stage

    @property
    def done(self) -> list[Done]:
        """What this worker has computed so far, and when, if ``StageOptions`` keep a record."""
        return self._worker.done if self._worker else []

    @property
    def busy_seconds(self) -> float:
        """Of computing, without what it waited for others."""
        return self._worker.busy_seconds if self._worker else 0.0

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Of tensors, to each other worker; of replicas also what they agree on gradients with."""
        return self._worker.sent_bytes if self._worker else {}

    @property
    def buffer_bytes(self) -> int:
        """Of memory that messages are received in."""
        return self._worker.buffer_bytes if self._worker else 0

    def train_step(self, batch: tuple[Any, Any]) -> float | None:
        """Feed inputs and targets; every worker is given every minibatch, in the same order.

        The loss where this worker has it, else None: the last stage, of the minibatches it ran.
        Weights follow as ``StageOptions.semantics`` says.
        """
        inputs, targets = batch
        if self._worker is None:
            self._worker = self._start(inputs)
        self._num_steps += 1
        loaded = self._traced.named_inputs(inputs) if self._stage.loads else {}
        return self._worker.train_step([loaded[name] for name in self._stage.loads], targets)

    def drain(self) -> None:
        """Let all minibatches come back; every worker must call it. Then training may go on."""
        if self._worker is not None:
            self._worker.drain()

    def restore(self, folder: Path) -> int:
        """Go on from the newest whole checkpoint of a folder, before the first ``train_step``.

        The number of minibatches that it has learned from; 0 if there is none. It may be of another
        number of stages. Raises InputError, here or with the first step, if it does not fit.
        """
        self._resumed = newest_checkpoint(folder)
        self._num_steps = self._resumed.index.steps if self._resumed else 0
        return self._num_steps

    def save(self, folder: Path) -> Path:
        """Drain, and write a checkpoint of all stages; every worker must call it.

        Raises OutputError, and InputError before the first step.
        """
        if self._worker is None:
            raise InputError("there is nothing to save before the first train_step")
        self._worker.drain()
        return save(
            folder,
            self._stage.body,
            self.stage_number,
            self._optimizer,
            self._scheduler,
            self._num_steps,
            self._worker.next_minibatch,
            is_writer=self.number == self.pipe.workers(self.stage_number)[0],
        )

    def close(self) -> None:
        """Drain and end; every worker must call it."""
        self.drain()
        if self._worker is not None:
            self._worker.close()

    def _start(self, inputs: Any) -> StageWorker:
        self._traced = trace_model(self._model.train(), inputs)
        self._stage = split(self._traced, self.plan)[self.stage_number]
        kept = set(self._stage.parameters())
        for parameter in self._model.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.new_empty(0)
        nothing = nn.Parameter(torch.empty(0))  # a stage may have none, which optimizers refuse
        self._optimizer = self._optimizer_fn(list(self._stage.parameters()) or [nothing])
        self._scheduler = self._scheduler_fn(self._optimizer) if self._scheduler_fn else None
        next_minibatch = 0
        if self._resumed is not None:
            self._resumed.restore(self._stage.body, self._optimizer)
            next_minibatch = self._resumed.index.next_minibatch
            if self._scheduler is not None:
                self._scheduler.load_state_dict(self._resumed.index.settings["scheduler"])
        return StageWorker(
            self._stage,
            self.pipe,
            self.number,
            self._optimizer,
            self._loss_fn,
            self._options,
            self._scheduler,
            next_minibatch,
            self.plan.options.depth,
        )
