"""Parts of a tensor: what a worker has of it, and what the whole looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from elbowroom.plans.grid_layout import Box, Layout


@dataclass(frozen=True, eq=False)
class Part:
    """One worker's part of a tensor.

    ``local`` has the box that ``layout`` gives ``worker`` of a tensor of the global ``shape``.
    """

    local: torch.Tensor
    shape: tuple[int, ...]
    layout: Layout
    worker: int

    @property
    def box(self) -> Box:
        return self.layout.box(self.worker, self.shape)

    def with_local(self, local: torch.Tensor) -> Part:
        """The same part of another tensor of the same shape."""
        return replace(self, local=local)


def cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    """A box of a whole tensor, as a view."""
    for dim, (start, stop) in enumerate(box):
        whole = whole.narrow(dim, start, stop - start)
    return whole


def part_of_whole(whole: torch.Tensor, layout: Layout, worker: int) -> Part:
    """A worker's part of a tensor that it has whole."""
    shape = tuple(whole.shape)
    return Part(cut(whole, layout.box(worker, shape)), shape, layout, worker)


def zeros_like_computed(shape: tuple[int, ...], *read: torch.Tensor | None) -> torch.Tensor:
    """Zeros that depend, for autograd, on all tensors that were read; None is none.

    A worker whose part is empty must have the same graph as the others: they wait for what its
    backward sends.
    """
    given = [tensor for tensor in read if tensor is not None]
    total = sum((tensor.sum() * 0 for tensor in given[1:]), given[0].sum() * 0)
    return given[0].new_zeros(shape) + total


def product_type(one: torch.Tensor, other: torch.Tensor) -> torch.dtype:
    """The type in which torch gives products of two tensors: that of autocast, where it is on."""
    return F.linear(one.new_zeros(1, 1), other.new_zeros(1, 1)).dtype
