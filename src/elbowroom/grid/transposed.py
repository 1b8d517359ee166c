"""Transposed convolutions on parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from elbowroom.core.windows import Interval, TransposedWindow, part_of
from elbowroom.grid.moves import fetch
from elbowroom.grid.parts import Part, product_type, zeros_like_computed
from elbowroom.grid.transport import Channel
from elbowroom.grid.windowed import FIRST_SPACE, result_shape, whole_dims
from elbowroom.plans.grid_layout import Layout

_CONVS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_transpose(
    part: Part,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    windows: Sequence[TransposedWindow],
    channel: Channel,
    *,
    groups: int = 1,
    layout: Layout | None = None,
    features: int | None = None,
) -> Part:
    """Convolve a part, transposed; the result's batch and space lie as those of ``part``.

    Arguments are those of ``windowed.conv``, but for ``weight``: [inputs, outputs / groups, kernel
    ...]. The bias comes last: outputs that no input reaches have it too.
    """
    wanted, firsts = _outputs(part, windows), []
    whole = whole_dims(part, windows)
    is_whole = [dim in whole for dim in range(FIRST_SPACE, len(part.shape))]
    for dim, window in enumerate(windows, FIRST_SPACE):
        if dim not in whole:
            part = part.with_local(fetch(part, dim, window, channel).local)
        rows = window.rows(wanted[dim - FIRST_SPACE], part.shape[dim])
        firsts.append(rows[0] if rows else 0)
    num_outputs = weight.shape[1] * groups
    local_shape = (len(part.local), num_outputs, *(rows.size for rows in wanted))
    if 0 in (*local_shape, *part.local.shape, *weight.shape):
        local = zeros_like_computed(local_shape, part.local, weight)
        local = local.to(product_type(part.local, weight))
    else:
        local = _spread(part.local, weight, windows, groups, is_whole)
        for k, window in enumerate(windows):
            if not is_whole[k]:
                start = firsts[k] * window.stride - window.padding
                local = _cut_or_padded(local, FIRST_SPACE + k, start, wanted[k])
    if bias is not None:
        local = local + bias.to(local.dtype).view(-1, *[1] * len(windows))
    shape = result_shape(part, windows, num_outputs if features is None else features)
    assert tuple(local.shape) == local_shape
    return replace(part, local=local, shape=shape, layout=layout or part.layout)


def _outputs(part: Part, windows: Sequence[TransposedWindow]) -> list[Interval]:
    """Rows of the result that this worker computes, of each dimension of space."""
    found = []
    for dim, window in enumerate(windows, FIRST_SPACE):
        index = part.layout.index(part.worker, dim)
        count = window.num_outputs(part.shape[dim])
        found.append(part_of(count, part.layout.parts[dim], index))
    return found


def _spread(
    local: torch.Tensor,
    weight: torch.Tensor,
    windows: Sequence[TransposedWindow],
    groups: int,
    is_whole: Sequence[bool],
) -> torch.Tensor:
    """All that rows reach; along dimensions that are whole, torch's own outputs."""
    pairs = list(zip(windows, is_whole, strict=True))
    return _CONVS[len(windows)](
        local,
        weight,
        None,
        tuple(window.stride for window in windows),
        tuple(window.padding if whole else 0 for window, whole in pairs),
        tuple(window.output_padding if whole else 0 for window, whole in pairs),
        groups,
        tuple(window.dilation for window in windows),
    )


def _cut_or_padded(local: torch.Tensor, dim: int, first: int, wanted: Interval) -> torch.Tensor:
    """Rows that begin at the global row ``first``, without those not wanted, zeros for missing."""
    start, stop = max(wanted.start, first), min(wanted.stop, first + local.shape[dim])
    if start >= stop:  # the gaps of a stride larger than the kernel
        start = stop = wanted.start
        local = local.narrow(dim, 0, 0)
    else:
        local = local.narrow(dim, start - first, stop - start)
    before, behind = start - wanted.start, wanted.stop - stop
    if not before and not behind:
        return local
    return F.pad(local, (*[0, 0] * (local.dim() - 1 - dim), before, behind))
