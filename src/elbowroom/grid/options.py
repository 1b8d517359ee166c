"""Settings of a training run on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from elbowroom.core.errors import InputError
from elbowroom.grid.flags import LossPlace


@dataclass(frozen=True)
class GridOptions:
    """How a grid trains.

    Args:
        seed: for dropout.
        loss: where the loss is taken: ``batch``, of each worker's own samples, is for a mean over
            samples; ``space``, of its samples and rows, for a mean over rows too; ``whole``, of all
            outputs on every worker, for any other.
        clip_norm: the largest norm of all gradients, as in ``torch.nn.utils.clip_grad_norm_``.
        autocast: type to compute in where that is done; None for none.
        keeps_record: keep when each message was waited for, for a trace.
        exact_randomness: draw the numbers of dropout for the whole tensor on each worker, so that
            they are the same on every grid.

    Raises InputError for another place of the loss.

    """

    seed: int = 0
    loss: LossPlace = "batch"
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    keeps_record: bool = False
    exact_randomness: bool = False

    def __post_init__(self) -> None:
        places = get_args(LossPlace)
        if self.loss not in places:
            raise InputError(f"a loss is taken of {self.loss!r}: give {', '.join(places)}")
