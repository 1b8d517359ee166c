"""Interpolations on all workers of a grid against torch on the whole tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812 (torch's own name)

from elbowroom.core.errors import InputError
from elbowroom.core.windows import Resize
from elbowroom.grid.resize import resize
from tests.grid.twins import (
    CASES,
    SEEDS,
    assert_hard,
    check,
    draw_procs,
    draw_sizes,
    layout_of,
    normal,
    note,
    on_grid,
    random_layout,
    started,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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
