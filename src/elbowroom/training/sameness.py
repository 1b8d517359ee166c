"""What all workers have to have alike before they train: weights, and the first minibatches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.training.microbatch import Minibatch


def make_equal(model: nn.Module) -> None:
    """Give all workers the weights and buffers of the first, if theirs differ.

    Every worker must call it. Raises InputError for models of other shapes.
    """
    tensors = [*(p.data for p in model.parameters()), *model.buffers()]
    if _agree([_digest(tensor) for tensor in tensors]):
        return
    if not _agree([tuple(tensor.shape) for tensor in tensors]):
        raise InputError("make_model gives the workers models of different shapes: let it not")
    if distributed.get_rank() == 0:
        warnings.warn(
            "make_model gives each worker other weights: those of the first are taken. Draw them "
            "with torch's random numbers",
            stacklevel=2,
        )
    with torch.no_grad():
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def check_same_batches(batches: Sequence[Minibatch]) -> None:
    """Raise InputError if workers were given different minibatches. Every worker must call it.

    Tensors are compared, and numbers beside them, such as sizes of microbatches.
    """
    leaves = pytree.tree_leaves(list(batches))
    tensors = [_digest(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    numbers = tuple(float(leaf) for leaf in leaves if isinstance(leaf, Real))
    if not _agree([*tensors, numbers]):
        raise InputError(
            "make_batch gives each worker another minibatch: draw all that is random in it from "
            "its generator, also what numpy and Python's random would draw, and cut it alike"
        )


def _agree(own: list[tuple[float, ...]]) -> bool:
    """Whether all workers have the same. Every worker must call it."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, repr(own))  # NaN is like NaN
    return len(set(found)) == 1


def _digest(tensor: torch.Tensor) -> tuple[float, ...]:
    """Its shape, and its sums, plain and weighted, which stand for its values."""
    values = tensor.detach().flatten()
    values = torch.view_as_real(values).flatten() if values.is_complex() else values
    values = values.double()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).sqrt()
    return (*tensor.shape, float(values.sum()), float(values @ places))
