"""Transposed convolutions on all workers of a grid against torch on the whole tensor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor

from elbowroom.core.windows import TransposedWindow, exchange
from elbowroom.grid.parts import Part
from elbowroom.grid.transport import Channel
from elbowroom.grid.transposed import conv_transpose
from tests.grid.twins import (
    CASES,
    SEEDS,
    assert_hard,
    check,
    draw_procs,
    draw_sizes,
    normal,
    note,
    random_layout,
    started,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONV_TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def draw_transposed(rng: random.Random, size: int) -> TransposedWindow:
    while True:
        kernel, stride, dilation = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 2)
        extra = rng.randint(0, max(stride, dilation) - 1)
        window = TransposedWindow(kernel, stride, rng.randint(0, kernel), dilation, extra)
        if window.num_outputs(size) > 0:
            return window


@pytest.mark.parametrize("seed", SEEDS)
def test_transposed_convolutions(seed: int) -> None:
    rng, seen = started(20 + seed), Counter[str]()
    for case in range(CASES):
        num_dims, groups = rng.randint(1, 3), rng.choice([1, 1, 2])
        sizes = [max(1, size // 2) for size in draw_sizes(rng, num_dims)]
        windows = [draw_transposed(rng, size) for size in sizes]
        dims = [0, *range(2, 2 + num_dims)]
        layout = random_layout(rng, draw_procs(rng, case), dims, 2 + num_dims)
        x = normal(rng.randint(1, 5), 4, *sizes)
        parameters = [normal(4, 3, *(each.kernel for each in windows))]
        if rng.random() < 0.8:
            parameters.append(normal(3 * groups))

        def on_part(part: Part, own: Sequence[Tensor], channel: Channel) -> Part:
            bias = own[1] if len(own) > 1 else None
            return conv_transpose(part, own[0], bias, windows, channel, groups=groups)  # noqa: B023

        def on_whole(whole: Tensor, own: Sequence[Tensor]) -> Tensor:
            columns = list(zip(*(vars(each).values() for each in windows), strict=True))  # noqa: B023
            _, stride, padding, dilation, extra = columns
            bias = own[1] if len(own) > 1 else None
            plain = CONV_TRANSPOSES[whole.dim() - 2]
            return plain(whole, own[0], bias, stride, padding, extra, groups, dilation)  # noqa: B023

        found = check(on_part, on_whole, layout, x, parameters, (layout, x.shape, windows))
        note(seen, layout, x.shape, found.output.shape)
        seen["reads nothing"] += any(
            outputs.size and not rows
            for window, size, parts in zip(windows, sizes, layout.parts[2:], strict=True)
            for found in [exchange(window, size, parts)]
            for outputs, rows in zip(found.outputs, found.rows, strict=True)
        )
    assert_hard(seen)
    assert seen["reads nothing"] >= 3, seen
