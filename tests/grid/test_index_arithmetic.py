"""Layers computed part by part, all parts in one process, against torch on the whole tensor.

What a part reads comes from its owners by nothing but the numbers of ``exchange``; outputs and all
gradients must be those of torch, in double precision.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor

from elbowroom.core.windows import (
    PADDING,
    AxisWindow,
    Exchange,
    Interval,
    Resize,
    TransposedWindow,
    Window,
    exchange,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 2
"""The one that is split."""

CASES = 1000
SEEDS = range(2)
"""Two thousand cases of each kind of layer."""

MOST = 1e-12


def fetched(x: Tensor, found: Exchange, taker: int) -> Tensor:
    """The rows that a part wants, each cut out of its owner's own part."""
    pieces = [
        x.narrow(DIM, own.start, own.size).narrow(DIM, each.start - own.start, each.size)
        for giver, own in enumerate(found.own)
        for each in found.taken(giver, taker)
    ]
    return torch.cat([x.narrow(DIM, 0, 0), *pieces], DIM)


def read(x: Tensor, found: Exchange, taker: int, value: float = 0.0) -> Tensor:
    """The rows that a part reads, in order, with ``value`` for PADDING."""
    got = fetched(x, found, taker)
    places = found.positions(taker)
    if PADDING in places:
        constant = got.new_full((*got.shape[:DIM], 1, *got.shape[DIM + 1 :]), value)
        got = torch.cat([got, constant], DIM)
    last = got.shape[DIM] - 1
    return got.index_select(
        DIM, torch.tensor([last if place == PADDING else place for place in places])
    )


def together(
    x: Tensor, window: AxisWindow, parts: int, compute: Callable[[int, Exchange], Tensor]
) -> Tensor:
    """The outputs of all parts, one behind the other."""
    found = exchange(window, x.shape[DIM], parts)
    busy = [part for part, outputs in enumerate(found.outputs) if outputs.size]
    return torch.cat([compute(part, found) for part in busy], DIM)


def check(plain: Tensor, split: Tensor, inputs: list[Tensor], case: object) -> None:
    """Both outputs, and their gradients of all inputs, are the same."""
    assert plain.shape == split.shape, case
    direction = torch.randn_like(plain)
    for one, other in zip(
        [plain, *torch.autograd.grad(plain, inputs, direction)],
        [split, *torch.autograd.grad(split, inputs, direction)],
        strict=True,
    ):
        most = MOST * one.detach().abs().max().clamp(min=1.0)
        assert (one - other).detach().abs().max() <= most, case


def note(seen: Counter[str], found: Exchange) -> None:
    """Count what makes a case hard."""
    parts = range(len(found.own))
    seen["far"] += any(found.taken(r, t) for r in parts for t in parts if abs(r - t) > 1)
    seen["empty input"] += any(not own.size for own in found.own)
    seen["empty output"] += any(not outputs.size for outputs in found.outputs)
    seen["reads nothing"] += any(
        outputs.size and not found.num_wanted(part) for part, outputs in enumerate(found.outputs)
    )
    seen["local"] += found.is_local and len(parts) > 1


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def drawn(
    draw: Callable[[random.Random], tuple[Any, ...] | None], seed: int
) -> Iterator[tuple[Any, ...]]:
    """So many cases, and as many torch seeds, that follow from one number."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(CASES):
        while (case := draw(rng)) is None:
            pass
        yield case


def draw_conv(rng: random.Random) -> tuple[Window, int, int] | None:
    kernel, stride, dilation = rng.randint(1, 11), rng.randint(1, 4), rng.randint(1, 2)
    mode = rng.choice(["zeros", "reflect", "replicate", "circular"])
    size, parts, padding = rng.randint(1, 40), rng.randint(1, 9), rng.randint(0, kernel)
    padding = min(padding, {"reflect": size - 1, "circular": size}.get(mode, padding))
    behind = padding if rng.random() < 0.7 else rng.randint(0, padding)
    window = Window(kernel, stride, padding, behind, dilation, mode=mode)  # type: ignore[arg-type]
    return (window, size, parts) if window.num_outputs(size) > 0 else None


@pytest.mark.parametrize("seed", SEEDS)
def test_convolutions(seed: int) -> None:
    seen: Counter[str] = Counter()
    for window, size, parts in drawn(draw_conv, seed):
        x, weight, bias = normal(2, 3, size), normal(4, 3, window.kernel), normal(4)
        mode = "constant" if window.mode == "zeros" else window.mode
        settings: dict[str, Any] = {"stride": window.stride, "dilation": window.dilation}
        padded = F.pad(x, (window.before, window.behind), mode=mode)
        plain = F.conv1d(padded, weight, bias, **settings)

        def one(part: int, found: Exchange) -> Tensor:
            return F.conv1d(read(x, found, part), weight, bias, **settings)  # noqa: B023

        split = together(x, window, parts, one)
        check(plain, split, [x, weight, bias], (window, size, parts))
        note(seen, exchange(window, size, parts))
        seen[window.mode] += 1
    least = {"far": 300, "empty input": 30, "empty output": 150, "reads nothing": 5}
    least |= dict.fromkeys(("zeros", "reflect", "replicate", "circular"), 150)
    assert all(seen[hard] >= number for hard, number in least.items()), seen


def draw_pool(rng: random.Random) -> tuple[Any, ...] | None:
    is_max, kernel, stride = rng.random() < 0.5, rng.randint(1, 7), rng.randint(1, 5)
    padding, dilation = rng.randint(0, kernel // 2), rng.randint(1, 2) if is_max else 1
    window = Window(kernel, stride, padding, padding, dilation, rng.random() < 0.7)
    size, parts = rng.randint(1, 30), rng.randint(1, 9)
    if size + 2 * padding < window.reach:
        return None
    if dilation > 1 and F.max_pool1d(torch.zeros(1, size), *pooling(window)).isinf().any():
        return None  # a window that sees nothing but padding
    return is_max, rng.random() < 0.5, window, size, parts


def pooling(window: Window) -> tuple[int, int, int, int, bool]:
    """Arguments of torch's max pooling."""
    rest = (window.before, window.dilation, window.ceil_mode)
    return (window.kernel, window.stride, *rest)


@pytest.mark.parametrize("seed", SEEDS)
def test_poolings(seed: int) -> None:
    seen: Counter[str] = Counter()
    for is_max, counts_padding, window, size, parts in drawn(draw_pool, seed):
        x = normal(2, 3, size, 2)
        kernel, stride, padding = (window.kernel, 1), (window.stride, 1), (window.before, 0)
        dilation = (window.dilation, 1)
        if is_max:
            plain = F.max_pool2d(x, kernel, stride, padding, dilation, window.ceil_mode)
        else:
            plain = F.avg_pool2d(x, kernel, stride, padding, window.ceil_mode, counts_padding)

        def one(part: int, found: Exchange) -> Tensor:
            if is_max:  # noqa: B023
                rows = read(x, found, part, -torch.inf)  # noqa: B023
                return F.max_pool2d(rows, kernel, stride, 0, dilation)  # noqa: B023
            total = F.avg_pool2d(read(x, found, part), kernel, stride, divisor_override=1)  # noqa: B023
            return total / divisor(window, found.outputs[part], size, counts_padding)  # noqa: B023

        check(plain, together(x, window, parts, one), [x], (window, size, parts))
        note(seen, exchange(window, size, parts))
        room = size + 2 * window.before - window.reach
        last = (window.num_outputs(size) - 1) * window.stride
        seen["overhangs"] += last > room
        seen["dropped"] += window.ceil_mode and room % window.stride != 0 and last <= room
        seen[f"{'max' if is_max else 'average'} {counts_padding}"] += 1
    least = {"far": 200, "empty input": 50, "empty output": 200, "overhangs": 120, "dropped": 60}
    least |= {"average True": 150, "average False": 150}
    assert all(seen[hard] >= number for hard, number in least.items()), seen


def divisor(window: Window, outputs: Interval, size: int, counts_padding: bool) -> Tensor:
    places = torch.arange(*outputs)
    start = places * window.stride - window.before
    stop = (start + window.kernel).clamp(max=size + window.behind)
    if not counts_padding:
        start, stop = start.clamp(min=0), stop.clamp(max=size)
    return (stop - start).double().unsqueeze(1)


def draw_transposed(rng: random.Random) -> tuple[TransposedWindow, int, int] | None:
    kernel, stride, dilation = rng.randint(1, 7), rng.randint(1, 5), rng.randint(1, 2)
    extra = rng.randint(0, max(stride, dilation) - 1)
    window = TransposedWindow(kernel, stride, rng.randint(0, kernel), dilation, extra)
    size, parts = rng.randint(1, 20), rng.randint(1, 9)
    return (window, size, parts) if window.num_outputs(size) > 0 else None


@pytest.mark.parametrize("seed", SEEDS)
def test_transposed_convolutions(seed: int) -> None:
    seen: Counter[str] = Counter()
    for window, size, parts in drawn(draw_transposed, seed):
        x, weight, bias = normal(2, 3, size), normal(3, 4, window.kernel), normal(4)
        plain = F.conv_transpose1d(
            x,
            weight,
            bias,
            window.stride,
            window.padding,
            window.output_padding,
            dilation=window.dilation,
        )

        def one(part: int, found: Exchange) -> Tensor:
            out = spread(fetched(x, found, part), weight, window, found, part)  # noqa: B023
            return out + bias.unsqueeze(1)  # noqa: B023

        case = (window, size, parts)
        check(plain, together(x, window, parts, one), [x, weight, bias], case)
        note(seen, exchange(window, size, parts))
        seen["gaps"] += window.stride > window.reach
        seen["output padding"] += window.output_padding > 0
        seen["dilated"] += window.dilation > 1
    least = {"far": 150, "empty input": 100, "empty output": 40, "reads nothing": 20}
    least |= {"gaps": 150, "output padding": 300, "dilated": 300}
    assert all(seen[hard] >= number for hard, number in least.items()), seen


def spread(
    rows: Tensor, weight: Tensor, window: TransposedWindow, found: Exchange, part: int
) -> Tensor:
    """What a part's rows add to its outputs: torch's, cut, or with zeros around."""
    outputs, read_rows = found.outputs[part], found.rows[part]
    out = rows.new_zeros(rows.shape[0], weight.shape[1], outputs.size)
    out = out + 0 * (rows.sum() + weight.sum())
    if not read_rows:
        return out
    whole = F.conv_transpose1d(rows, weight, None, window.stride, dilation=window.dilation)
    first = read_rows[0] * window.stride - window.padding
    start, stop = max(outputs.start, first), min(outputs.stop, first + whole.shape[DIM])
    if start >= stop:
        return out
    return F.pad(
        whole.narrow(DIM, start - first, stop - start),
        (start - outputs.start, outputs.stop - stop),
    )


def draw_resize(rng: random.Random) -> tuple[Any, ...] | None:
    mode = rng.choice(["nearest", "nearest-exact", "linear", "linear"])
    aligned = mode == "linear" and rng.random() < 0.5
    size, parts = rng.randint(1, 40), rng.randint(1, 9)
    if rng.random() < 0.5:
        return mode, aligned, None, rng.randint(1, 100), size, parts
    factor = rng.choice([2.0, 3.0, 0.5, 1.05, 2.05, rng.uniform(0.2, 4)])
    count = int(size * factor)
    return (mode, aligned, factor, count, size, parts) if count else None


@pytest.mark.parametrize("seed", SEEDS)
def test_resizes(seed: int) -> None:
    seen: Counter[str] = Counter()
    for mode, aligned, factor, count, size, parts in drawn(draw_resize, seed):
        x = normal(2, 3, size, 2)
        settings: dict[str, Any] = {"mode": mode}
        if mode == "linear":
            settings = {"mode": "bilinear", "align_corners": aligned}
        if factor is None:
            plain = F.interpolate(x, (count, 2), **settings)
        else:
            plain = F.interpolate(x, scale_factor=(factor, 1.0), **settings)
        window = Resize(count, size / count if factor is None else 1 / factor, mode, aligned)

        def one(part: int, found: Exchange) -> Tensor:
            taps = window.taps(found.outputs[part], size)  # noqa: B023
            first = found.rows[part][0]
            rows = fetched(x, found, part)  # noqa: B023
            low, high = (rows.index_select(DIM, torch.tensor(at) - first) for at in taps[:2])
            return torch.lerp(low, high, torch.tensor(taps.share, dtype=x.dtype).unsqueeze(1))  # noqa: B023

        check(plain, together(x, window, parts, one), [x], (window, size, parts))
        note(seen, exchange(window, size, parts))
        seen[f"{mode} {aligned} {factor is None}"] += 1
        seen["copies"] += count == size and factor not in (None, 1.0)
    least = {"far": 50, "empty input": 50, "empty output": 30, "copies": 10}
    assert all(seen[hard] >= number for hard, number in least.items()), seen
    assert sum(key.endswith(("True", "False")) for key in seen) == 8, seen
