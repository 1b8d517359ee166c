"""Convolutions and poolings on all workers of a grid against torch on the whole tensor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor

from elbowroom.core.windows import PaddingMode, Window
from elbowroom.grid.parts import Part
from elbowroom.grid.transport import Channel
from elbowroom.grid.windowed import avg_pool, conv, max_pool
from elbowroom.plans.grid_layout import Layout
from tests.grid.twins import (
    CASES,
    SEEDS,
    Split,
    assert_hard,
    check,
    draw_procs,
    draw_sizes,
    layout_of,
    normal,
    note,
    random_layout,
    started,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def draw_window(rng: random.Random, size: int, mode: PaddingMode) -> Window:
    while True:
        kernel, stride, dilation = rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 2)
        before, behind = rng.randint(0, kernel), rng.randint(0, kernel)
        if rng.random() < 0.7:
            behind = before
        most = {"reflect": size - 1, "circular": size}.get(mode, kernel)
        if max(before, behind) > most:
            continue
        window = Window(kernel, stride, before, behind, dilation, mode=mode)
        if window.num_outputs(size) > 0:
            return window


def pads_of(windows: Sequence[Window]) -> list[int]:
    return [rows for each in reversed(windows) for rows in (each.before, each.behind)]


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Sequence[Window]) -> Tensor:
    mode = windows[0].mode
    x = F.pad(x, pads_of(windows), mode="constant" if mode == "zeros" else mode)
    strides = [each.stride for each in windows]
    return CONVS[len(windows)](x, weight, bias, strides, 0, [each.dilation for each in windows])


@pytest.mark.parametrize("seed", SEEDS)
def test_convolutions(seed: int) -> None:
    rng, seen = started(seed), Counter[str]()
    for case in range(CASES):
        num_dims = rng.randint(1, 3)
        mode = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
        sizes = draw_sizes(rng, num_dims)
        windows = [draw_window(rng, size, mode) for size in sizes]  # type: ignore[arg-type]
        dims = [0, *range(2, 2 + num_dims)]
        layout = random_layout(rng, draw_procs(rng, case), dims, 2 + num_dims)
        x = normal(rng.randint(1, 5), 3, *sizes)
        parameters = [normal(4, 3, *(each.kernel for each in windows))]
        if rng.random() < 0.8:
            parameters.append(normal(4))

        def on_part(part: Part, own: Sequence[Tensor], channel: Channel) -> Part:
            bias = own[1] if len(own) > 1 else None
            return conv(part, own[0], bias, windows, channel)  # noqa: B023

        def on_whole(whole: Tensor, own: Sequence[Tensor]) -> Tensor:
            return plain_conv(whole, own[0], own[1] if len(own) > 1 else None, windows)  # noqa: B023

        found = check(on_part, on_whole, layout, x, parameters, (layout, x.shape, windows))
        note(seen, layout, x.shape, found.output.shape)
    assert_hard(seen)


def test_convolutions_of_parts_of_the_features() -> None:
    """Weights in parts of their inputs give summands, and in parts of their outputs parts."""
    rng = started(7)
    for _ in range(30):
        windows = [draw_window(rng, 9, "zeros"), draw_window(rng, 7, "zeros")]
        x, weight = normal(3, 5, 9, 7), normal(6, 5, *(each.kernel for each in windows))
        read = Layout((3, 2, 2, 2), ((), (0,), (1,), (2,)))
        computed = Layout((3, 2, 2, 2), ((), (3,), (1,), (2,)))

        def on_part(part: Part, own: Sequence[Tensor], channel: Channel) -> Part:
            return conv(part, own[0], None, windows, channel, layout=computed, features=6)  # noqa: B023

        def on_whole(whole: Tensor, own: Sequence[Tensor]) -> Tensor:
            return plain_conv(whole, own[0], None, windows)  # noqa: B023

        check(on_part, on_whole, read, x, [weight], splits=[Split(((3,), (0,), (), ()))])


def test_convolutions_in_groups() -> None:
    windows = [Window(3, 2, 1, 1), Window(3, 1, 1, 1)]
    check(
        lambda part, own, channel: conv(part, own[0], own[1], windows, channel, groups=2),
        lambda x, own: F.conv2d(x, own[0], own[1], (2, 1), 1, groups=2),
        layout_of([2, 1, 2, 2]),
        normal(3, 4, 9, 5),
        [normal(6, 2, 3, 3), normal(6)],
    )


def draw_pool(rng: random.Random, size: int, dilation: int, ceil_mode: bool) -> Window:
    while True:
        kernel, stride = rng.randint(1, 4), rng.randint(1, 4)
        padding = rng.randint(0, kernel // 2)
        window = Window(kernel, stride, padding, padding, dilation, ceil_mode)
        if size + 2 * padding >= window.reach and (dilation == 1 or not padding):
            return window


def plain_pool(x: Tensor, windows: Sequence[Window], how: Sequence[Any]) -> Tensor:
    is_max, counts_padding, divisor = how
    kernel = [each.kernel for each in windows]
    stride, padding = [each.stride for each in windows], [each.before for each in windows]
    ceil_mode = windows[0].ceil_mode
    if is_max:
        dilation = [each.dilation for each in windows]
        return MAX_POOLS[len(windows)](x, kernel, stride, padding, dilation, ceil_mode)
    if len(windows) == 1:
        assert divisor is None, "torch has it in two dimensions and three"
        return F.avg_pool1d(x, kernel, stride, padding, ceil_mode, counts_padding)
    pool = F.avg_pool2d if len(windows) == 2 else F.avg_pool3d
    return pool(x, kernel, stride, padding, ceil_mode, counts_padding, divisor)


@pytest.mark.parametrize("seed", SEEDS)
def test_poolings(seed: int) -> None:
    rng, seen = started(10 + seed), Counter[str]()
    for case in range(CASES):
        num_dims, is_max = rng.randint(1, 3), rng.random() < 0.5
        sizes = [size + 4 for size in draw_sizes(rng, num_dims)]
        dilation, ceil_mode = rng.randint(1, 2) if is_max else 1, rng.random() < 0.6
        windows = [draw_pool(rng, size, dilation, ceil_mode) for size in sizes]
        counts, divisor = rng.random() < 0.5, 5 if num_dims > 1 and rng.random() < 0.2 else None
        how = (is_max, counts, divisor)
        layout = random_layout(rng, draw_procs(rng, case), range(2 + num_dims), 2 + num_dims)
        x = normal(rng.randint(1, 5), 3, *sizes)

        def on_part(part: Part, _: Sequence[Tensor], channel: Channel) -> Part:
            if is_max:  # noqa: B023
                return max_pool(part, windows, channel)  # noqa: B023
            rest = {"count_include_pad": counts, "divisor_override": divisor}  # noqa: B023
            return avg_pool(part, windows, channel, **rest)  # type: ignore[arg-type] # noqa: B023

        found = check(
            on_part,
            lambda whole, _: plain_pool(whole, windows, how),  # noqa: B023
            layout,
            x,
            (),
            (layout, x.shape, windows, how),
        )
        note(seen, layout, x.shape, found.output.shape)
    assert_hard(seen)
