"""Gradients of a stage, scaled so that their norm over all stages stays below a limit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed

from elbowroom.plans.pipeline_shape import Pipe

_MARGIN = 1e-6
"""Added to norms before they divide, as ``torch.nn.utils.clip_grad_norm_`` does."""


def norm_of(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The norm of all elements of all gradients, a tensor without dimensions."""
    return torch.nn.utils.get_total_norm(gradients.values())


def norm_of_stages(norm: torch.Tensor, pipe: Pipe) -> torch.Tensor:
    """The norm over all stages, from ``norm`` of this worker's own; every worker must call it.

    In float64, the same on all workers. Replicas have the same gradients, which count once.
    """
    norms = [torch.zeros((), dtype=torch.float64) for _ in range(pipe.num_workers)]
    distributed.all_gather(norms, norm.double())
    firsts = [norms[pipe.workers(stage)[0]] for stage in range(pipe.num_stages)]
    return torch.nn.utils.get_total_norm(firsts)


def clipped(
    gradients: Mapping[str, torch.Tensor], norm: torch.Tensor, limit: float
) -> dict[str, torch.Tensor]:
    """Gradients whose norm is ``norm``, as they are or scaled down to ``limit``."""
    scale = limit / (norm + _MARGIN)
    if scale >= 1:
        return dict(gradients)
    return {name: gradient * scale for name, gradient in gradients.items()}
