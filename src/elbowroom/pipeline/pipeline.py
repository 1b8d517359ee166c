"""Training of a model in stages on the workers of a process group, minibatch after minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elbowroom.core.errors import InputError
from elbowroom.pipeline.first_checks import (
    FirstLoss,
    check_stages,
    loss_as_it_is,
    mean_of_means,
)
from elbowroom.pipeline.microbatches import (
    check_microbatches,
    is_cut,
    pairs_in,
    rows_of,
    sizes_of,
)
from elbowroom.pipeline.options import LossFunction, StageOptions
from elbowroom.pipeline.split import split
from elbowroom.pipeline.stage_actions import Done
from elbowroom.pipeline.worker import StageWorker
from elbowroom.plans.pipeline import PipelinePlan, Semantics
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.training.checkpoint import Checkpoint, newest_of_run, save
from elbowroom.training.checkpoint_content import check_settings, content_of, names_of, note_made
from elbowroom.training.keeping import Keeper
from elbowroom.training.layers import trace_model
from elbowroom.training.loop import check_optimizer, check_scheduler
from elbowroom.training.microbatch import Minibatch
from elbowroom.training.outcome import in_training
from elbowroom.training.python_state import PythonState
from elbowroom.training.sameness import check_same_batches, make_equal
from elbowroom.training.script import OptimizerFunction
from elbowroom.training.stage import StageModule
from elbowroom.training.traced import TracedModel
from elbowroom.training.tracing import RECOMPUTE_DROPPED

SchedulerFunction = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""Makes the scheduler of a stage's optimizer."""


class _Built(NamedTuple):
    """What a worker can only make once the first minibatch has been traced."""

    traced: TracedModel
    module: StageModule
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    worker: StageWorker


class Pipeline:
    """One worker's part of a pipeline; its number is that in the default process group.

    All workers give the same model, with the same weights. It is taken over: each keeps the weights
    of its own stage, which are trained, and lets those of the others go.

    Args:
        model: what ``torch.fx`` or ``torch.export`` can trace, or an ``nn.Sequential``.
        plan: as many workers as the process group has, stages of this model's layers.
        optimizer_fn: makes an optimizer of a stage's parameters, such as
            ``partial(torch.optim.AdamW, lr=1e-3)``.
        loss_fn: from the model's outputs and the targets to a mean over a minibatch.
        options: see ``StageOptions``.
        scheduler_fn: makes a scheduler of the optimizer; it steps after every update of the stage.
        keeper: keeps what minibatches in flight have saved, such as ``swap.minibatches``; it is
            closed with the pipeline. None: they stay where they are.

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
        keeper: Keeper | None = None,
    ) -> None:
        size = distributed.get_world_size()
        if size != plan.num_workers:
            raise InputError(
                f"the plan {plan} is for {plan.num_workers} workers, and there are {size}: start "
                f"as many (torchrun --nproc-per-node), or plan again"
            )
        self.plan = plan
        self.pipe = Pipe(plan.replicas)
        self.worker = distributed.get_rank()
        self.stage = self.pipe.stages[self.worker]
        options = options or StageOptions()
        self.semantics: Semantics = options.semantics or plan.options.semantics
        self._options = replace(options, semantics=self.semantics)
        self._model = model
        self._optimizer_fn = optimizer_fn
        self._scheduler_fn = scheduler_fn
        self._loss_fn = loss_fn
        self._keeper = keeper
        self._built: _Built | None = None
        self._resumed: Checkpoint | None = None
        self._num_steps = 0
        self.notes: list[str] = []
        """What to know of this run, a line each, from the checks before the first update."""

    @property
    def module(self) -> StageModule:
        """The module that this worker trains. Raises InputError before the first ``train_step``."""
        if self._built is None:
            raise InputError("the first train_step makes the stage's module: there is none before")
        return self._built.module

    @property
    def done(self) -> list[Done]:
        """What this worker has computed so far, and when, if ``StageOptions`` keep a record."""
        return self._built.worker.done if self._built else []

    @property
    def busy_seconds(self) -> float:
        """Seconds of computing, without what it waited for other stages."""
        return self._built.worker.busy_seconds if self._built else 0.0

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Bytes sent to each worker: activations, gradients, and gradient all-reduce traffic."""
        return self._built.worker.sent_bytes if self._built else {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that messages are received in."""
        return self._built.worker.buffer_bytes if self._built else 0

    def prepare(self, batches: Iterable[Minibatch]) -> list[Minibatch]:
        """Trace the model with the first of these minibatches, and check the stages on all.

        It trains with none of them, and returns them. Every worker must call it with the same,
        after ``restore``; or else ``train_step`` does it with its first minibatch. Raises
        InputError, SplitError, or UntraceableModelError for what would not be trained as in a plain
        loop: minibatches too that change, as they are made, what the model or the loss reads.
        """
        assert self._built is None, "the model is prepared once"
        python = PythonState(self._model, self._loss_fn)
        made = list(batches)
        if changed := python.changed():
            raise InputError(
                f"making minibatches changes '{changed[0]}', which the model or the loss reads: "
                f"give it to them as an input"
            )
        self._built = self._build(made)
        return made

    def train_step(self, batch: Minibatch) -> float | None:
        """Feed inputs and targets; every worker is given every minibatch, in the same order.

        The loss where this worker has it, else None: the last stage, of the minibatches it ran.
        Weights follow as ``StageOptions.semantics`` says. With ``flush`` a minibatch may come cut
        already: a list of as many ``Microbatch`` as the options say, of any shapes. Their losses
        are weighted by their sizes, so that the gradient is that of the whole minibatch's mean.
        Raises InputError for what does not fit.
        """
        if self._built is None:
            self.prepare([batch])
        assert self._built is not None
        sizes, worker = sizes_of(batch, self._options), self._built.worker
        pairs = [(self._own(inputs), targets) for inputs, targets in pairs_in(batch)]
        self._num_steps += 1
        if sizes:
            return worker.train_parts(pairs, sizes)
        [(own, targets)] = pairs
        return worker.train_step(own, targets, rows_of(batch[0]))

    def drain(self) -> None:
        """Finish all minibatches in flight; every worker must call it. Then training may resume."""
        if self._built is not None:
            self._built.worker.drain()

    def restore(self, folder: Path) -> int:
        """Resume from the newest whole checkpoint of a folder, before the first ``train_step``.

        Gives the number of minibatches that it was trained with; 0 if there is none. It may be of
        another number of stages. Raises InputError, here or with the first step, if it does not
        fit.
        """
        self._resumed = newest_of_run(folder, self._options.seed)
        self._num_steps = self._resumed.index.steps if self._resumed else 0
        return self._num_steps

    def save(self, folder: Path) -> Path:
        """Drain, and write a checkpoint of all stages; every worker must call it.

        Raises OutputError, and InputError before the first step.
        """
        if self._built is None:
            raise InputError("there is nothing to save before the first train_step")
        self._built.worker.drain()
        content = None
        if self.worker == self.pipe.workers(self.stage)[0]:
            built = self._built
            content = content_of(built.module.body, built.optimizer, built.scheduler)
        return save(
            folder,
            self.stage,
            content,
            self._num_steps,
            self._built.worker.next_minibatch,
            {"seed": self._options.seed},
        )

    def close(self) -> None:
        """Drain and end; every worker must call it."""
        self.drain()
        if self._built is not None:
            self._built.worker.close()
        if self._keeper is not None:
            self._keeper.close()

    def _own(self, inputs: Any) -> list[torch.Tensor]:
        """Those of the model's inputs that this stage reads."""
        assert self._built is not None
        traced, loads = self._built.traced, self._built.module.loads
        loaded = traced.named_inputs(inputs) if loads else {}
        return [loaded[name] for name in loads]

    def _check_model(self) -> None:
        """Raise InputError for what has no meaning where several versions of weights live."""
        for name, parameter in self._model.named_parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise InputError(
                    f"'{name}' has a hook on its gradient, which versions of it have not: change "
                    f"the gradient in the forward, or in the optimizer"
                )
        for name, module in self._model.named_modules():
            if getattr(module, "max_norm", None) is not None and self.semantics != "flush":
                raise InputError(
                    f"'{name}' renormalises its weights in its forward (max_norm), which semantics "
                    f"'{self.semantics}' cannot keep apart: use --semantics flush"
                )

    def _check_recompute(self, traced: TracedModel) -> None:
        """Note that activations are kept; raise InputError where other weights would be used."""
        if traced.graph.recompute == "dropped":
            self.notes.append(RECOMPUTE_DROPPED)
        elif traced.graph.recompute == "kept" and self.semantics != "flush":
            raise InputError(
                f"torch.utils.checkpoint would compute again with newer weights under semantics "
                f"'{self.semantics}': use --semantics flush"
            )

    def _first_checks(
        self,
        traced: TracedModel,
        stages: list[StageModule],
        batches: Sequence[Minibatch],
    ) -> LossFunction:
        """Check the stages against the whole model; the loss function that checks the first loss.

        All of the model must be there still.
        """
        count = self._options.microbatches
        check_stages(traced, stages, batches, self._options)
        whole = [pair for batch in batches if not is_cut(batch) for pair in pairs_in(batch)]
        if count > 1 and whole:
            check_microbatches(self._model, whole[0][0], count)
            note = mean_of_means(self._model, self._loss_fn, whole, count)
            self.notes += [note] if note else []
        if count > 1 and any(
            isinstance(m, _BatchNorm) and m.training for m in self._model.modules()
        ):
            self.notes.append("batch norms see the rows of a microbatch, not of a minibatch")
        expected = None
        if self._resumed is None and count == 1:
            [first] = pairs_in(batches[0])
            expected = loss_as_it_is(self._model, self._loss_fn, first, self._options)
            if expected is None:
                self.notes.append("random numbers: the first loss is not compared with a plain one")
        is_first = self.worker == self.pipe.workers(self.pipe.num_stages - 1)[0]
        expected = expected if is_first else None
        return FirstLoss(self._loss_fn, self._model, expected, self._options)

    def _build(self, batches: Sequence[Minibatch]) -> _Built:
        """Trace the model with the first minibatch, keep this stage of it, and restore that."""
        self._check_model()
        if self._resumed is None:
            make_equal(self._model)
        check_same_batches(batches)
        for batch in batches:
            sizes_of(batch, self._options)
        traced = trace_model(in_training(self._model), pairs_in(batches[0])[0][0])
        self._check_recompute(traced)
        stages = split(traced, self.plan)
        loss_fn = self._first_checks(traced, stages, batches)
        module = stages[self.stage]
        del stages
        kept = set(module.parameters())
        for parameter in self._model.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.new_empty(0)
        nothing = nn.Parameter(torch.empty(0))  # a stage may have none, which optimizers refuse
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = self._optimizer_fn(trained or [nothing])
        check_optimizer(optimizer)
        note_made(optimizer)
        scheduler = self._scheduler_fn(optimizer) if self._scheduler_fn else None
        check_scheduler(scheduler)
        check_settings(names_of(module.body), optimizer, scheduler)
        next_minibatch = 0
        if self._resumed is not None:
            self._resumed.restore(module.body, optimizer, scheduler)
            next_minibatch = self._resumed.index.next_minibatch
        worker = StageWorker(
            module,
            self.pipe,
            self.worker,
            optimizer,
            loss_fn,
            self._options,
            scheduler,
            next_minibatch,
            self.plan.options.depth,
            self._keeper,
        )
        return _Built(traced, module, optimizer, scheduler, worker)
