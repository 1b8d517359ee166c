"""Convolutions and poolings on parts: rows are fetched from neighbours, then torch computes.

Tensors have the batch first, then features, then one to three dimensions of space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from elbowroom.core.windows import PADDING, AxisWindow, Interval, Window, exchange, part_of
from elbowroom.grid.moves import fetch
from elbowroom.grid.parts import Part, product_type, zeros_like_computed
from elbowroom.grid.transport import Channel
from elbowroom.plans.grid_layout import Layout

FIRST_SPACE = 2
"""The first dimension of space: the batch and features come before it."""

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}


def conv(
    part: Part,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    windows: Sequence[Window],
    channel: Channel,
    *,
    groups: int = 1,
    layout: Layout | None = None,
    features: int | None = None,
) -> Part:
    """Convolve a part; the result's batch and space lie as those of ``part``.

    Args:
        part: the input.
        weight: [outputs, inputs / groups, kernel ...], this worker's slice of it.
        bias: [outputs] or None; leave it away where the result is a summand of several workers.
        windows: one for each dimension of space.
        channel: what rows are fetched by.
        groups: of channels; more than one only where channels are whole.
        layout: of the result, where its features lie otherwise than the input's.
        features: of the whole result, where ``weight`` has a part of them.

    """
    read = read_rows(part, windows, channel)
    shape = result_shape(part, windows, weight.shape[0] if features is None else features)
    local_shape = (len(read.local), weight.shape[0], *read.num_outputs)
    if math.prod(local_shape) == 0 or 0 in weight.shape:
        local = zeros_like_computed(local_shape, read.local, weight, bias)
        local = local.to(product_type(read.local, weight))
    else:
        stride, dilation = _strides(windows), tuple(window.dilation for window in windows)
        local = _CONVS[len(windows)](
            read.local, weight, bias, stride, read.padding, dilation, groups
        )
    return replace(part, local=local, shape=shape, layout=layout or part.layout)


def max_pool(part: Part, windows: Sequence[Window], channel: Channel) -> Part:
    """Take the largest element of each window."""
    read = read_rows(part, windows, channel, -math.inf)
    local_shape = (*read.local.shape[:FIRST_SPACE], *read.num_outputs)
    if 0 in local_shape:
        local = zeros_like_computed(local_shape, read.local)
    else:
        kernel, dilation = _kernels(windows), tuple(window.dilation for window in windows)
        local = _MAX_POOLS[len(windows)](
            read.local, kernel, _strides(windows), read.padding, dilation
        )
    return replace(part, local=local, shape=result_shape(part, windows, part.shape[1]))


def avg_pool(
    part: Part,
    windows: Sequence[Window],
    channel: Channel,
    *,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Part:
    """Take the mean of each window, divided as torch does on the whole tensor."""
    num_behind = len(windows)
    read = read_rows(part, windows, channel)
    local_shape = (*read.local.shape[:FIRST_SPACE], *read.num_outputs)
    if 0 in local_shape:
        local = zeros_like_computed(local_shape, read.local)
    else:
        sizes = part.shape[FIRST_SPACE:]
        counts = [
            _num_averaged(window, rows, size, count_include_pad)
            for window, rows, size in zip(windows, read.outputs, sizes, strict=True)
        ]
        is_even = all(bool((each == each[0]).all()) for each in counts)
        if divisor_override is not None or is_even:
            divisor = divisor_override or math.prod(int(each[0]) for each in counts)
            local = _averages(read, windows, divisor)
        else:
            local = _averages(read, windows, 1)
            for each in counts:  # each along its own dimension, the last one along the last
                num_behind -= 1
                local = local / each.to(local.device, local.dtype).view(-1, *[1] * num_behind)
    return replace(part, local=local, shape=result_shape(part, windows, part.shape[1]))


@dataclass(frozen=True, eq=False)
class ReadRows:
    """What a worker's outputs read, in order and padded but for ``padding``.

    ``padding`` is what torch is to pad, the same before and behind, of each dimension of space;
    ``outputs`` are the rows of the result that this worker computes.
    """

    local: torch.Tensor
    padding: tuple[int, ...]
    outputs: tuple[Interval, ...]

    @property
    def num_outputs(self) -> tuple[int, ...]:
        return tuple(rows.size for rows in self.outputs)


def read_rows(
    part: Part, windows: Sequence[Window], channel: Channel, value: float = 0.0
) -> ReadRows:
    """Fetch what windows read along all dimensions, and only then pad, with ``value``.

    A dimension that is whole is left to torch, which pads without a copy. Raises PeerLostError.
    """
    outputs, padding, pads = [], [], []
    orders: list[tuple[int, torch.Tensor]] = []
    whole = whole_dims(part, windows)
    for dim, window in enumerate(windows, FIRST_SPACE):
        size, parts = part.shape[dim], part.layout.parts[dim]
        index = part.layout.index(part.worker, dim)
        outputs.append(part_of(window.num_outputs(size), parts, index))
        is_torchs = dim in whole and _is_torchs(window)
        padding.append(window.before if is_torchs else 0)
        if is_torchs:
            pads.append((0, 0))
            continue
        part = part.with_local(fetch(part, dim, window, channel).local)
        arranged = _arranged(window, size, parts, index)
        pads.append((arranged.before, arranged.behind))
        if arranged.order is not None:
            orders.append((dim, arranged.order))
    local = part.local
    for dim, order in orders:
        local = local.index_select(dim, order.to(local.device))
    if any(before or behind for before, behind in pads):
        flat = [rows for pair in reversed(pads) for rows in pair]
        local = F.pad(local, flat, value=value)
    return ReadRows(local, tuple(padding), tuple(outputs))


def whole_dims(part: Part, windows: Sequence[AxisWindow]) -> set[int]:
    """Dimensions of space of which each worker has all that is read, and nothing else.

    Where another dimension is split, rows that nobody reads are left out before it sends.
    """
    dims = range(FIRST_SPACE, len(part.shape))
    parts = part.layout.parts
    if all(parts[dim] == 1 for dim in dims):
        return {*dims}
    return {
        dim
        for dim, window in zip(dims, windows, strict=True)
        if parts[dim] == 1 and exchange(window, part.shape[dim], 1).is_local
    }


def result_shape(part: Part, windows: Sequence[AxisWindow], features: int) -> tuple[int, ...]:
    """The global shape of what windows give."""
    sizes = part.shape[FIRST_SPACE:]
    space = (window.num_outputs(size) for window, size in zip(windows, sizes, strict=True))
    return (part.shape[0], features, *space)


@dataclass(frozen=True, eq=False)
class _Arranged:
    """Where fetched rows stand: their order, None for as they are, and constants around them."""

    order: torch.Tensor | None
    before: int
    behind: int


@lru_cache(maxsize=4096)
def _arranged(window: Window, size: int, parts: int, index: int) -> _Arranged:
    found = exchange(window, size, parts)
    positions = found.positions(index)
    real = [position for position in positions if position != PADDING]
    first = next((k for k, position in enumerate(positions) if position != PADDING), len(positions))
    is_in_order = real == list(range(found.num_wanted(index)))
    order = None if is_in_order else torch.tensor(real, dtype=torch.long)
    return _Arranged(order, first, len(positions) - first - len(real))


def _is_torchs(window: Window) -> bool:
    """Whether torch computes it by itself, its padding included."""
    is_even = window.before == window.behind
    return is_even and window.mode == "zeros" and not window.ceil_mode


def _averages(read: ReadRows, windows: Sequence[Window], divisor: int) -> torch.Tensor:
    """The sum of each window, divided, in the type of the rows, also where autocast has another.

    In one dimension torch has none: a second has size 1.
    """
    rows, kernel, stride, padding = read.local, _kernels(windows), _strides(windows), read.padding
    if len(windows) > 1:
        pool = _AVG_POOLS[len(windows)]
        return pool(rows, kernel, stride, padding, divisor_override=divisor).to(rows.dtype)
    kernel, stride, padding = (*kernel, 1), (*stride, 1), (*padding, 0)
    pooled = F.avg_pool2d(rows.unsqueeze(-1), kernel, stride, padding, divisor_override=divisor)
    return pooled.squeeze(-1)


@lru_cache(maxsize=4096)
def _num_averaged(
    window: Window, outputs: Interval, size: int, counts_padding: bool
) -> torch.Tensor:
    """By how many rows each output's sum is divided; what overhangs the padding never counts."""
    start = torch.arange(*outputs) * window.stride - window.before
    stop = (start + window.kernel).clamp(max=size + window.behind)
    if not counts_padding:
        start, stop = start.clamp(min=0), stop.clamp(max=size)
    return stop - start


def _kernels(windows: Sequence[Window]) -> tuple[int, ...]:
    return tuple(window.kernel for window in windows)


def _strides(windows: Sequence[Window]) -> tuple[int, ...]:
    return tuple(window.stride for window in windows)
