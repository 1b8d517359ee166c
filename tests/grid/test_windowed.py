"""Layers with windows on all workers of a grid against torch on the whole tensor."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor

from elbowroom.core.errors import InputError
from elbowroom.core.windows import PaddingMode, Resize, TransposedWindow, Window, exchange
from elbowroom.grid.parts import Part
from elbowroom.grid.resize import resize
from elbowroom.grid.transport import Channel, Counted
from elbowroom.grid.transposed import conv_transpose
from elbowroom.grid.windowed import avg_pool, conv, max_pool
from elbowroom.plans.grid_layout import Layout
from tests.grid.twins import Split, check, layout_of, note, on_grid, random_layout

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = 150
SEEDS = range(2)
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSES = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def started(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def draw_procs(rng: random.Random, case: int) -> int:
    """From 2 to 9 workers, and once 64."""
    return 64 if case == 0 else rng.choice([2, 3, 4, 5, 6, 6, 7, 8, 8, 9, 9])


def draw_sizes(rng: random.Random, num_dims: int) -> list[int]:
    return [rng.randint(1, {1: 40, 2: 15, 3: 7}[num_dims]) for _ in range(num_dims)]


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


MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("seed", SEEDS)
def test_resizes(seed: int) -> None:
    rng, seen = started(30 + seed), Counter[str]()
    for case in range(CASES):
        num_dims = rng.randint(1, 3)
        mode = rng.choice(["nearest", "nearest-exact", "linear"])
        aligned = mode == "linear" and rng.random() < 0.5
        sizes = draw_sizes(rng, num_dims)
        factors = [rng.choice([2.0, 3.0, 0.5, rng.uniform(0.5, 3)]) for _ in sizes]
        counts = [int(size * factor) for size, factor in zip(sizes, factors, strict=True)]
        if 0 in counts:
            factors, counts = [], [rng.randint(1, 12) for _ in sizes]
        settings: dict[str, Any] = {"mode": MODES[num_dims] if mode == "linear" else mode}
        settings |= {"align_corners": aligned} if mode == "linear" else {}
        settings |= {"scale_factor": factors} if factors else {"size": counts}
        scales = [1 / factor for factor in factors] or [
            size / count for size, count in zip(sizes, counts, strict=True)
        ]
        windows = [
            Resize(count, scale, mode, aligned)  # type: ignore[arg-type]
            for count, scale in zip(counts, scales, strict=True)
        ]
        layout = random_layout(rng, draw_procs(rng, case), range(2 + num_dims), 2 + num_dims)
        x = normal(rng.randint(1, 5), 3, *sizes)
        try:
            found = check(
                lambda part, _, channel: resize(part, windows, channel),  # noqa: B023
                lambda whole, _: F.interpolate(whole, **settings),  # noqa: B023
                layout,
                x,
                (),
                (layout, x.shape, windows),
            )
        except InputError:
            assert num_dims != 2 and mode != "linear"
            seen["refused"] += 1
            continue
        note(seen, layout, x.shape, found.output.shape)
    assert_hard(seen)
    assert seen["refused"] < CASES // 10, seen


def test_a_resize_whose_rows_torch_does_not_know_is_refused() -> None:
    """Four rows by 2.05 are eight, by torch's forward 0 0 0 1 ..., by its backward 0 0 1 1 ..."""
    window = Resize(8, 1 / 2.05)
    x = normal(1, 1, 4)
    with pytest.raises(InputError, match=r"4 rows to 8"):
        on_grid(
            lambda part, _, channel: resize(part, [window], channel),
            layout_of([1, 1, 2]),
            x,
            (),
            normal(1, 1, 8),
        )


def assert_hard(seen: Counter[str]) -> None:
    least = {"workers without input": 10, "workers without output": 10, "replicas": 10}
    least |= {"several axes": 5, "batch and space": 10, "batch smaller than parts": 5}
    assert all(seen[hard] >= number for hard, number in least.items()), seen


def draw_halo(rng: random.Random, case: int) -> tuple[Window, list[int]]:
    kernel, stride = rng.choice([1, 3, 5, 7, 11]), rng.choice([1, 2, 4])
    dilation = rng.randint(1, 2)
    reach = dilation * (kernel - 1) + 1
    parts = [[4, 1], [2, 2], [1, 4], [2, 1], [3, 2], [2, 4]][case % 6]
    return Window(kernel, stride, (reach - 1) // 2, (reach - 1) // 2, dilation), parts


@pytest.mark.parametrize("seed", range(2))
def test_halos_are_what_the_closed_form_says(seed: int) -> None:
    """Messages and bytes, both ways: as ``exchange`` counts them, and by a formula.

    Rows of the second dimension are sent with the rows of the first that are there by then.
    """
    rng, seen = started(40 + seed), Counter[str]()
    for case in range(60):
        window, parts = draw_halo(rng, case)
        batch = 2 if case % 3 == 0 else 1
        # Strides divide the shares, and no halo is wider than a share.
        share = 4 * (1 + window.reach // 4)
        sizes = [share * count if count > 1 else 8 + rng.randint(0, 3) for count in parts]
        sizes = [max(size, window.reach) for size in sizes]
        layout, x = layout_of([batch, 1, *parts], replicas=rng.choice([1, 1, 2])), None
        x = normal(3, 2, *sizes)
        result = check(
            lambda part, own, channel: conv(part, own[0], None, [window] * 2, channel),  # noqa: B023
            lambda whole, own: plain_conv(whole, own[0], None, [window] * 2),  # noqa: B023
            layout,
            x,
            [normal(1, 2, window.kernel, window.kernel)],
        )
        copies = layout.num_workers // (batch * parts[0] * parts[1])
        counted = by_exchange(window, sizes, parts, batch)
        formula = by_formula(window, sizes, parts, batch)
        assert counted == formula, (window, sizes, parts)
        wanted = Counted(formula.messages * copies, formula.num_bytes * copies)
        for way in ("forward", "backward"):
            assert result.sent.get(way, Counted()) == wanted, (way, window, parts)  # type: ignore[call-overload]
        seen["both axes"] += parts[0] > 1 and parts[1] > 1
        seen["silent"] += wanted.messages == 0
    assert seen["both axes"] >= 20 and 3 <= seen["silent"] <= 20, seen


def by_exchange(window: Window, sizes: list[int], parts: list[int], batch: int) -> Counted:
    """What moves, row by row: 2 features of 3 samples, 8 bytes each."""
    first, second = (exchange(window, *each) for each in zip(sizes, parts, strict=True))
    messages = rows = 0
    for place in range(parts[0]):
        for column in range(parts[1]):
            for other in range(parts[0]):
                taken = sum(each.size for each in first.taken(other, place))
                if taken and other != place:
                    messages += batch
                    rows += taken * second.own[column].size
            there = first.num_wanted(place)
            there = sizes[0] if parts[0] == 1 else there
            for other in range(parts[1]):
                taken = sum(each.size for each in second.taken(other, column))
                if taken and other != column:
                    messages += batch
                    rows += taken * there
    return Counted(messages, rows * 3 * 2 * 8)


def by_formula(window: Window, sizes: list[int], parts: list[int], batch: int) -> Counted:
    below = window.before
    above = max(0, window.reach - window.stride - window.before)
    sides = bool(below) + bool(above)
    messages = batch * sides * ((parts[0] - 1) * parts[1] + (parts[1] - 1) * parts[0])
    rows = (parts[0] - 1) * (below + above) * sizes[1]
    there = sizes[0]
    if parts[0] > 1:  # where strides are short, that and (parts - 1) halos
        there += parts[0] * (window.reach - window.stride) - below - above
    rows += (parts[1] - 1) * (below + above) * there
    return Counted(messages, rows * 3 * 2 * 8)
