"""Minibatches cut into microbatches: which tensors are cut, and whether the model allows it.

Or they come cut already, in microbatches of any shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.pipeline.options import StageOptions
from elbowroom.training.microbatch import Microbatch, Minibatch
from elbowroom.training.outcome import untouched
from elbowroom.training.tracing import called
from elbowroom.training.values import tensors_in

_RELATIVE_ERROR = 1e-2


def is_cut(batch: Minibatch) -> bool:
    """Whether a minibatch comes in microbatches.

    Raises InputError for one that is neither that nor inputs and targets.
    """
    are_parts = [isinstance(one, Microbatch) for one in batch]
    if all(are_parts):
        return True
    if any(are_parts) or len(are_parts) != 2:
        raise InputError(
            f"a minibatch of {len(are_parts)} things: give (inputs, targets), or a list of nothing "
            "but elbowroom.Microbatch"
        )
    return False


def pairs_in(batch: Minibatch) -> list[tuple[Any, Any]]:
    """Inputs and targets of each microbatch that a minibatch comes in, or of it as a whole."""
    if is_cut(batch):
        return [(part.inputs, part.targets) for part in batch]
    inputs, targets = batch
    return [(inputs, targets)]


def sizes_of(batch: Minibatch, options: StageOptions) -> list[float]:
    """Sizes of the microbatches that a minibatch comes in; none of one that is not cut.

    Raises InputError for another number of them than the options say, for sizes that are no
    weights, and with semantics that have no microbatches.
    """
    if not is_cut(batch):
        return []
    if options.semantics != "flush":
        raise InputError(
            f"a list of microbatches with semantics '{options.semantics}': each update there is of "
            "one whole minibatch. Take 'flush', or give (inputs, targets)"
        )
    if len(batch) != options.microbatches:
        raise InputError(
            f"a list of {len(batch)} microbatches, and the options say {options.microbatches}: "
            "give as many as microbatches (--microbatches) says"
        )
    sizes = [float((rows_of(p.inputs) or 0) if p.size is None else p.size) for p in batch]
    if not all(size > 0 and math.isfinite(size) for size in sizes):
        raise InputError(f"microbatches of sizes {sizes}: give each more than 0")
    return sizes


def rows_of(value: Any) -> int | None:
    """Rows of the first tensor that has any."""
    return next((len(tensor) for tensor in tensors_in(value) if tensor.ndim), None)


def microbatches(batch: Any, count: int, num_rows: int | None = None) -> list[Any]:
    """A minibatch cut into parts of equal size: its tensors of ``num_rows`` rows, in any structure.

    ``num_rows`` None is the number of rows of the first tensor. Others are in each part whole.
    Raises InputError for a minibatch that is no multiple.
    """
    if num_rows is None:
        num_rows = rows_of(batch) or 0
    if num_rows % count:
        raise InputError(
            f"a minibatch of {num_rows} is not {count} equal microbatches: drop the last, or "
            f"choose another number"
        )
    size = num_rows // count

    def part(number: int) -> Any:
        def cut(tensor: torch.Tensor) -> torch.Tensor:
            is_whole = not tensor.ndim or len(tensor) != num_rows
            return tensor if is_whole else tensor[number * size : (number + 1) * size]

        return pytree.tree_map_only(torch.Tensor, cut, batch)

    return [part(number) for number in range(count)]


def check_microbatches(model: nn.Module, inputs: Any, count: int) -> None:
    """Raise InputError if rows of a part are not what they are in the whole minibatch.

    Compared in ``eval()``: dropout draws otherwise, and norms over a batch differ by design.
    """
    part = microbatches(inputs, count)[0]
    with untouched(model), torch.no_grad():
        model.eval()
        try:
            whole, one = (tensors_in(called(model, each)) for each in (inputs, part))
        except Exception as error:
            raise InputError(
                f"the model does not run on a part of a minibatch: {error}: leave --microbatches 1"
            ) from error
    for of_whole, of_part in zip(whole, one, strict=True):
        if of_whole.ndim and len(of_whole) == count * len(of_part):
            expected, found = of_whole[: len(of_part)].double(), of_part.double()
            if not (expected - found).norm() <= _RELATIVE_ERROR * expected.norm() + 1e-6:
                raise InputError(
                    "rows of a part of a minibatch are not what they are in the whole: an input "
                    "that is not one of rows has as many (a mask, for example). Make it a buffer, "
                    "or leave --microbatches 1"
                )
