"""Training of a script's model in this process, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.training.checkpoint import newest_of_run, save
from elbowroom.training.checkpoint_content import check_settings, content_of, names_of, note_made
from elbowroom.training.outcome import in_training, seed_minibatch
from elbowroom.training.script import TrainingScript
from elbowroom.training.tracing import called


@dataclass(frozen=True)
class LoopOptions:
    """Settings of a loop.

    Args:
        num_steps: steps to come, which a script's scheduler is told.
        seed: for weights, data and dropout.
        lr: rate of AdamW, for a script that makes no optimizer.
        clip_norm: the largest norm of all gradients that the optimizer is given, as in
            ``torch.nn.utils.clip_grad_norm_``.
        autocast: type to compute in where that is done; None for none.

    """

    num_steps: int
    seed: int = 0
    lr: float | None = None
    clip_norm: float | None = None
    autocast: torch.dtype | None = None


class TrainingLoop:
    """A script's model, optimizer, scheduler and batches.

    Take ``batches`` in turn; for each, call ``backward``, which runs forward and backward, and then
    ``update``. What holds memory between them is the model's, the optimizer's and the batch.
    ``num_done`` counts the updates, those before a ``restore`` included. ``swapped`` makes of the
    script's optimizer, and a limit for the norm of gradients, one that also clips them.

    Raises InputError for a script that fails, or gives something else.
    """

    def __init__(
        self,
        script: TrainingScript,
        options: LoopOptions,
        swapped: Callable[[torch.optim.Optimizer, float | None], torch.optim.Optimizer]
        | None = None,
    ) -> None:
        self._script = script
        self._options = options
        self.model = in_training(script.make_model(options.seed))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = script.optimizer_fn(options.lr)(trained)
        check_optimizer(self.optimizer)
        note_made(self.optimizer)
        self._clip_norm = options.clip_norm
        if swapped is not None:
            self.optimizer, self._clip_norm = swapped(self.optimizer, options.clip_norm), None
        self._scheduler = None
        if script.has_scheduler:
            self._scheduler = script.make_scheduler(self.optimizer, options.num_steps)
        self._generator = torch.Generator().manual_seed(options.seed)
        self.num_done = 0
        check_scheduler(self._scheduler)
        check_settings(names_of(self.model), self.optimizer, self._scheduler)

    @property
    def num_steps(self) -> int:
        """Updates of the whole run."""
        return self._options.num_steps

    def restore(self, folder: Path) -> None:
        """Resume from the newest whole checkpoint of a folder, if it has one.

        Raises InputError if that does not fit.
        """
        found = newest_of_run(folder, self._options.seed)
        if found is not None:
            found.restore(self.model, self.optimizer, self._scheduler)
            self.num_done = found.index.steps

    def save(self, folder: Path) -> None:
        """Write a checkpoint. Raises OutputError, and InputError for another run's folder."""
        done = self.num_done
        whole = self.optimizer.state_dict()  # what is away comes back, and stays until this goes
        content = content_of(self.model, self.optimizer, self._scheduler)
        save(folder, 0, content, done, done, {"seed": self._options.seed})
        del whole

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The script's minibatches that no checkpoint has learned from."""
        for step in range(self._options.num_steps):
            batch = self._script.make_batch(self._generator)
            if step >= self.num_done:
                yield batch
            del batch

    def backward(self, batch: tuple[Any, Any]) -> float:
        """Run forward and backward. Returns the loss; raises InputError if it is no number."""
        inputs, targets = batch
        seed_minibatch(self._options.seed, 0, self.num_done)
        dtype = self._options.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            loss = self._script.loss_fn(called(self.model, inputs), targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InputError(f"{self._script.path}: loss_fn must return a tensor of one number")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def update(self) -> None:
        """Update the weights and forget the gradients."""
        if self._clip_norm is not None:
            groups = self.optimizer.param_groups
            updated = [parameter for group in groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(updated, self._clip_norm)
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self.optimizer.zero_grad()
        self.num_done += 1


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError for an optimizer that needs more than gradients."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError("LBFGS computes the loss several times an update: take another")


def check_scheduler(scheduler: LRScheduler | None) -> None:
    """Raise InputError for a scheduler that needs more than a count of updates."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InputError("ReduceLROnPlateau needs a metric at every step: take another")


def dtype_of(autocast: str | None) -> torch.dtype | None:
    """The type that ``--autocast`` names; None for none."""
    return {None: None, "bf16": torch.bfloat16}[autocast]


def num_samples(inputs: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    first = next(tensors, None)
    return len(first) if first is not None and first.dim() else 1
