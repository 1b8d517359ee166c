"""How a pipeline trains: the options of a run that are not in its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline import Semantics
from elbowroom.plans.pipeline_schedule import Kind, ScheduleRule
from elbowroom.plans.pipeline_shape import BUCKET_BYTES

LossFunction = Callable[[Any, Any], torch.Tensor]
"""From the last stage's outputs and the targets to a mean over the minibatch."""


@dataclass(frozen=True)
class StageOptions:
    """How a pipeline trains.

    Args:
        semantics: which weight version a minibatch uses, see ``versions``. None: the plan's;
            without one ``stash``.
        microbatches: the number that a minibatch is split into with ``flush``, or comes in; 1
            otherwise.
        seed: for dropout and other randomness, with the stage and the minibatch.
        autocast: compute in this type where ``torch.autocast`` does.
        keeps_record: keep every pass in ``StageWorker.done``.
        clip_norm: the largest norm of the gradients over all stages, as in
            ``torch.nn.utils.clip_grad_norm_``. With ``flush`` it is exactly that norm. Otherwise no
            stage knows the others' in time, and each of n stages is clipped to
            clip_norm / sqrt(n), so that all together never exceed it. Replicas clip the mean of
            their gradients.
        bucket_bytes: gradients that replicas send at once, while they still compute others.
        schedule: the order of passes. None: ``1f1b-flush`` with ``flush``, ``1f1b`` otherwise.
            ``gpipe``, with ``flush`` alone, runs all forwards before the first backward.

    Raises InputError for several microbatches or a flushed schedule without ``flush``, for
    ``1f1b`` with it, and for a norm or buckets of 0 and less.

    """

    semantics: Semantics | None = None
    microbatches: int = 1
    seed: int = 0
    autocast: torch.dtype | None = None
    keeps_record: bool = False
    clip_norm: float | None = None
    bucket_bytes: int = BUCKET_BYTES
    schedule: Kind | None = None

    def __post_init__(self) -> None:
        is_flushed = self.semantics == "flush"
        semantics = f"'{self.semantics}'" if self.semantics else "of the plan"
        if self.microbatches < 1 or (self.microbatches > 1 and not is_flushed):
            raise InputError(
                f"{self.microbatches} microbatches with semantics {semantics}: give 1, or more "
                "with 'flush'"
            )
        if self.schedule is not None and (self.schedule == "1f1b") == is_flushed:
            raise InputError(
                f"schedule '{self.schedule}' with semantics {semantics}: gpipe and 1f1b-flush go "
                "with 'flush', 1f1b with all others"
            )
        if self.bucket_bytes < 1 or (self.clip_norm is not None and not self.clip_norm > 0):
            raise InputError(
                f"clip_norm {self.clip_norm}, bucket_bytes {self.bucket_bytes}: give more than 0"
            )

    def computing(self) -> torch.autocast:
        """The context that forward passes and losses are computed in."""
        dtype = self.autocast
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    def schedule_rule(self, depth: int) -> ScheduleRule:
        """The rule that a worker's actions follow, at the depth of the plan."""
        is_flushed = self.semantics == "flush"
        kind = self.schedule or ("1f1b-flush" if is_flushed else "1f1b")
        return ScheduleRule(
            kind, self.microbatches if is_flushed else None, 1 if kind == "gpipe" else depth
        )
