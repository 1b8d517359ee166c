"""Training of a script's model in this process, one batch after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.training.outcome import in_training
from elbowroom.training.script import TrainingScript
from elbowroom.training.tracing import called


@dataclass(frozen=True)
class LoopOptions:
    """Settings of a loop.

    Args:
        num_steps: steps to come, which a script's scheduler is told.
        seed: for weights, data and dropout.
        lr: rate of AdamW, for a script that makes no optimizer.
        clip_norm: the largest norm of all gradients, as in ``torch.nn.utils.clip_grad_norm_``.
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

    Raises InputError for a script that fails, or gives something else.
    """

    def __init__(self, script: TrainingScript, options: LoopOptions) -> None:
        self._script = script
        self._options = options
        self.model = in_training(script.make_model(options.seed))
        self.optimizer = script.optimizer_fn(options.lr)(self.model.parameters())
        self._scheduler = None
        if script.has_scheduler:
            self._scheduler = script.make_scheduler(self.optimizer, options.num_steps)
        self._generator = torch.Generator().manual_seed(options.seed)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The script's minibatches, each made when the one before is let go of."""
        for _ in range(self._options.num_steps):
            yield self._script.make_batch(self._generator)

    def backward(self, batch: tuple[Any, Any]) -> float:
        """Run forward and backward. Returns the loss; raises InputError if it is no number."""
        inputs, targets = batch
        dtype = self._options.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            loss = self._script.loss_fn(called(self.model, inputs), targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InputError(f"{self._script.path}: loss_fn must return a tensor of one number")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def update(self) -> None:
        """Update the weights and forget the gradients."""
        if self._options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip_norm)
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self.optimizer.zero_grad()


def dtype_of(autocast: str | None) -> torch.dtype | None:
    """The type that ``--autocast`` names; None for none."""
    return {None: None, "bf16": torch.bfloat16}[autocast]


def num_samples(inputs: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    first = next(tensors, None)
    return len(first) if first is not None and first.dim() else 1
