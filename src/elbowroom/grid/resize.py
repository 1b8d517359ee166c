"""Interpolation on parts, by rows and weights of the whole tensor's coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from elbowroom.core.errors import InputError
from elbowroom.core.windows import Interval, Resize
from elbowroom.grid.moves import fetch
from elbowroom.grid.parts import Part, zeros_like_computed
from elbowroom.grid.transport import Channel
from elbowroom.grid.windowed import FIRST_SPACE

_ATEN: Any = torch.ops.aten
_LINEAR = {1: _ATEN.upsample_linear1d, 2: _ATEN.upsample_bilinear2d, 3: _ATEN.upsample_trilinear3d}
_NEAREST = {
    ("nearest", 1): _ATEN.upsample_nearest1d,
    ("nearest", 2): _ATEN.upsample_nearest2d,
    ("nearest", 3): _ATEN.upsample_nearest3d,
    ("nearest-exact", 1): _ATEN._upsample_nearest_exact1d,
    ("nearest-exact", 2): _ATEN._upsample_nearest_exact2d,
    ("nearest-exact", 3): _ATEN._upsample_nearest_exact3d,
}


def resize(part: Part, windows: Sequence[Resize], channel: Channel) -> Part:
    """Interpolate all dimensions of space; the result lies as ``part`` does.

    Rows of all dimensions are fetched before any is interpolated. Raises InputError where torch
    itself does not say which rows are nearest: it takes others in its backward.
    """
    sizes = part.shape[FIRST_SPACE:]
    shape = (*part.shape[:FIRST_SPACE], *(window.outputs for window in windows))
    local_shape = part.layout.local_shape(part.worker, shape)
    if all(part.layout.parts[dim] == 1 for dim in range(FIRST_SPACE, len(shape))):
        if 0 in local_shape:
            local = zeros_like_computed(local_shape, part.local)
        else:
            local = _torchs(part.local, windows, sizes)
        return replace(part, local=local, shape=shape)
    for window, size in zip(windows, sizes, strict=True):
        if window.mode != "linear":
            is_double = part.local.dtype == torch.float64
            _check_nearest(window, size, len(windows), is_double, part.local.device)
    for dim, window in enumerate(windows, FIRST_SPACE):
        part = part.with_local(fetch(part, dim, window, channel).local)
    if 0 in local_shape:
        return replace(part, local=zeros_like_computed(local_shape, part.local), shape=shape)
    local, box = part.local, part.layout.box(part.worker, shape)
    for dim, window in enumerate(windows, FIRST_SPACE):
        local = _interpolated(local, dim, window, box[dim], part.shape[dim])
    return replace(part, local=local, shape=shape)


def _interpolated(
    local: torch.Tensor, dim: int, window: Resize, outputs: Interval, size: int
) -> torch.Tensor:
    """One dimension, whose rows begin with the first that ``outputs`` read."""
    taps = _taps(window, outputs, size)
    low = local.index_select(dim, taps.low.to(local.device))
    if not taps.share.any():
        return low
    high = local.index_select(dim, taps.high.to(local.device))
    share = taps.share.to(local.device, local.dtype)
    share = share.view(-1, *[1] * (local.dim() - 1 - dim))
    return low * (1 - share) + high * share


class _Taps:
    """Two fetched rows for each output, and the second one's share, as tensors."""

    def __init__(self, window: Resize, outputs: Interval, size: int) -> None:
        taps = window.taps(outputs, size)
        first = min(taps.low)
        self.low = torch.tensor(taps.low) - first
        self.high = torch.tensor(taps.high) - first
        self.share = torch.tensor(taps.share, dtype=torch.float64)


@lru_cache(maxsize=4096)
def _taps(window: Resize, outputs: Interval, size: int) -> _Taps:
    return _Taps(window, outputs, size)


def _torchs(local: torch.Tensor, windows: Sequence[Resize], sizes: Sequence[int]) -> torch.Tensor:
    """Torch's own interpolation of a tensor whose space is whole."""
    scales = [
        None if window.scale == size / window.outputs else 1 / window.scale
        for window, size in zip(windows, sizes, strict=True)
    ]
    outputs = [window.outputs for window in windows]
    if windows[0].mode == "linear":
        aligned = windows[0].aligned
        result: torch.Tensor = _LINEAR[len(windows)](local, outputs, aligned, *scales)
    else:
        result = _NEAREST[windows[0].mode, len(windows)](local, outputs, *scales)
    return result


@lru_cache(maxsize=4096)
def _check_nearest(
    window: Resize, size: int, num_dims: int, is_double: bool, device: torch.device
) -> None:
    """Raise InputError unless torch takes the rows that we do.

    On CPUs, in one dimension and in three, it rounds otherwise forward than backward, for some
    sizes and scale factors; in two dimensions it never does.
    """
    dtype = torch.float64 if is_double else torch.float32
    rows = torch.arange(size, dtype=dtype, device=device)
    probe = rows.view(1, 1, size, *[1] * (num_dims - 1))
    others = [Resize(1, 1.0, window.mode)] * (num_dims - 1)
    found = _torchs(probe, [window, *others], [size, *[1] * (num_dims - 1)]).flatten()
    if found.tolist() != list(window.taps(Interval(0, window.outputs), size).low):
        raise InputError(
            f"an interpolation of {size} rows to {window.outputs} by '{window.mode}' takes other "
            f"rows in torch's forward than in its backward: interpolate to a size, not by a "
            f"factor, or to another size, or do not split its space"
        )
