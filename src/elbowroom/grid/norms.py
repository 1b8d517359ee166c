"""Normalization on parts: statistics of rows and samples that lie on several workers.

Each worker's count of elements follows from global sizes, so that means and sums of squares travel
once forward, and two sums once backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch.autograd.function import once_differentiable

from elbowroom.core.errors import InputError
from elbowroom.grid.parts import Part, zeros_like_computed
from elbowroom.grid.transport import Channel, Route, all_sum

_BATCH, _FEATURES = 0, 1


@dataclass(frozen=True, eq=False)
class Running:
    """Running statistics of a batch normalization: a module's own buffers, or slices of them.

    ``momentum`` None is a cumulative mean, as in torch.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    num_batches: torch.Tensor | None = None
    momentum: float | None = 0.1

    @torch.no_grad()
    def update(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Take in a minibatch of so many elements a feature, and of this biased variance."""
        share = self.counted()
        # In their data: a use before, of the same module, may have saved them for its backward.
        self.mean.data.lerp_(mean.to(self.mean.dtype), share)
        unbiased = variance * (count / (count - 1))
        self.variance.data.lerp_(unbiased.to(self.variance.dtype), share)

    @torch.no_grad()
    def counted(self) -> float:
        """Count a minibatch; the share of its statistics in the running ones."""
        if self.num_batches is not None:
            self.num_batches.add_(1)
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches is not None, "a cumulative mean counts minibatches"
        return 1.0 / int(self.num_batches)


def batch_norm(
    part: Part,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    channel: Channel,
    *,
    eps: float = 1e-5,
    uses_batch: bool = True,
    running: Running | None = None,
) -> Part:
    """Normalize each feature over the samples and rows of all workers.

    Where features are split, parameters and running statistics are those of this worker's features.
    With ``uses_batch`` statistics are the minibatch's, and ``running`` is updated by them, else
    they are the running ones. Raises InputError where a feature has a single element.
    """
    local = part.local
    if not uses_batch:
        assert running is not None, "without the minibatch's statistics there must be others"
        if local.numel() == 0:
            return part.with_local(zeros_like_computed(tuple(local.shape), local, weight, bias))
        mean, variance = running.mean, running.variance
        return part.with_local(F.batch_norm(local, mean, variance, weight, bias, False, 0.0, eps))
    count = part.shape[_BATCH] * math.prod(part.shape[2:])
    if count == 1:
        raise InputError(
            "a batch normalization has one element of each feature, which has no variance: train "
            "with more samples"
        )
    others = tuple(dim for dim in range(len(part.shape)) if dim != _FEATURES)
    sharing = _sharing(part, others, 1, channel)
    if sharing is None:
        share = running.counted() if running is not None else 0.0
        if local.numel() == 0:
            return part.with_local(zeros_like_computed(tuple(local.shape), local, weight, bias))
        means = None if running is None else running.mean
        variances = None if running is None else running.variance
        return part.with_local(
            F.batch_norm(local, means, variances, weight, bias, True, share, eps)
        )
    result, mean, variance = _Normalized.apply(local, others, eps, sharing)  # type: ignore[no-untyped-call]
    if running is not None:
        running.update(mean.flatten(), variance.flatten(), count)
    return part.with_local(_scaled(result, local.dtype, weight, bias))


def group_norm(
    part: Part,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    channel: Channel,
    *,
    eps: float = 1e-5,
) -> Part:
    """Normalize each sample over its rows and a group of features; instances: groups of one.

    Parameters are those of this worker's features. Raises InputError where a group lies on several
    parts of the features.
    """
    parts = part.layout.parts[_FEATURES]
    if groups % parts:
        raise InputError(
            f"a group normalization has {groups} groups in {parts} parts of its features, and a "
            f"group must lie in one part: read it with features whole"
        )
    local = part.local
    num_groups, size = groups // parts, part.shape[_FEATURES] // groups
    sharing = _sharing(part, range(2, len(part.shape)), size, channel)
    if sharing is None:
        if local.numel() == 0:
            return part.with_local(zeros_like_computed(tuple(local.shape), local, weight, bias))
        return part.with_local(F.group_norm(local, num_groups, weight, bias, eps))
    split = local.reshape(local.shape[0], num_groups, size, *local.shape[2:])
    dims = tuple(range(2, split.dim()))
    result, *_ = _Normalized.apply(split, dims, eps, sharing)  # type: ignore[no-untyped-call]
    return part.with_local(_scaled(result.reshape(local.shape), local.dtype, weight, bias))


def layer_norm(
    part: Part,
    num_dims: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
) -> Part:
    """Normalize over the last ``num_dims`` dimensions, each of which a worker must have whole.

    Raises InputError where one of them is split.
    """
    if math.prod(part.layout.parts[-num_dims:]) > 1:
        raise InputError(
            f"a layer normalization is over the last {num_dims} dimensions, of "
            f"{part.layout.parts[-num_dims:]} parts: read it with them whole"
        )
    local = part.local
    if local.numel() == 0:
        return part.with_local(zeros_like_computed(tuple(local.shape), local, weight, bias))
    return part.with_local(F.layer_norm(local, part.shape[-num_dims:], weight, bias, eps))


class _Sharing(NamedTuple):
    """Workers that have other elements of the same statistics, and how many each has of one."""

    workers: tuple[int, ...]
    counts: tuple[int, ...]
    channel: Channel
    route: Route

    @property
    def total(self) -> int:
        return sum(self.counts)


def _sharing(part: Part, shared: Sequence[int], per_row: int, channel: Channel) -> _Sharing | None:
    """Workers that have other parts of the dimensions ``shared``; None where there are none."""
    layout = part.layout
    digits = [digit for dim in shared for digit in layout.dims[dim]]
    if not digits:
        return None
    workers = layout.group(part.worker, digits)
    boxes = [layout.box(worker, part.shape) for worker in workers]
    counts = tuple(per_row * math.prod(box[dim].size for dim in shared) for box in boxes)
    return _Sharing(workers, counts, channel, channel.route("SUM"))


class _Normalized(torch.autograd.Function):
    """A tensor of mean 0 and variance 1 over some dimensions, and the mean and biased variance.

    In single precision at least.
    """

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, dims: tuple[int, ...], eps: float, sharing: _Sharing
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.dims, ctx.sharing, ctx.dtype = dims, sharing, local.dtype
        rows = local.to(torch.promote_types(local.dtype, torch.float32))
        mean, variance = _statistics(rows, dims, sharing)
        scale = torch.rsqrt(variance + eps)
        result = (rows - mean) * scale
        ctx.save_for_backward(result, scale)
        ctx.mark_non_differentiable(mean, variance)
        return result, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> Any:
        result, scale = ctx.saved_tensors
        workers, _, channel, route = ctx.sharing
        sums = torch.stack(
            [
                gradient.sum(ctx.dims, keepdim=True),
                (gradient * result).sum(ctx.dims, keepdim=True),
            ]
        )
        one, other = all_sum(sums, workers, channel, route, "backward") / ctx.sharing.total
        local = (gradient - one - result * other) * scale
        return local.to(ctx.dtype), None, None, None


def _statistics(
    rows: torch.Tensor, dims: tuple[int, ...], sharing: _Sharing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over all workers, the same bits on each.

    Each sends its mean and its sum of squares around it, but one that has no elements.
    """
    workers, counts, channel, route = sharing
    place = workers.index(channel.worker)
    if rows.numel():
        variance, mean = torch.var_mean(rows, dims, correction=0, keepdim=True)
        own = torch.stack([mean, variance * counts[place]])
    else:
        kept = [1 if dim in dims else size for dim, size in enumerate(rows.shape)]
        own = rows.new_zeros(2, *kept)
    givers = [k for k, count in enumerate(counts) if count]
    found = {k: torch.empty_like(own) for k in givers if k != place}
    takers = [worker for k, worker in enumerate(workers) if k != place]
    sends = dict.fromkeys(takers, own) if counts[place] else {}
    channel.swap(sends, {workers[k]: tensor for k, tensor in found.items()}, route, "forward")
    found[place] = own
    mean = torch.zeros_like(own[0])
    for k in givers:
        mean += found[k][0] * (counts[k] / sharing.total)
    squares = torch.zeros_like(mean)
    for k in givers:
        squares += found[k][1] + counts[k] * (found[k][0] - mean).square()
    return mean, squares / sharing.total


def _scaled(
    result: torch.Tensor,
    dtype: torch.dtype,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """With a weight and a bias of each feature."""
    view = (-1, *[1] * (result.dim() - 2))
    if weight is not None:
        result = result * weight.view(view)
    if bias is not None:
        result = result + bias.view(view)
    return result.to(dtype)
