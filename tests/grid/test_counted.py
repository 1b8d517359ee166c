"""What layers with windows, and norms, send on workers of one process, and what a plan counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.core.windows import AxisWindow, Resize, TransposedWindow, Window
from elbowroom.grid.norms import batch_norm, group_norm
from elbowroom.grid.resize import resize
from elbowroom.grid.transport import Counted
from elbowroom.grid.transposed import conv_transpose
from elbowroom.grid.windowed import avg_pool, conv, max_pool
from elbowroom.plans.grid import GridPlan, LayerGrid
from elbowroom.plans.grid_layout import Sent
from elbowroom.plans.grid_placement import place
from elbowroom.plans.grid_traffic import traffic
from tests.grid.twins import OnPart, on_grid

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 4
BYTES = 8
CASES = 40


def draw_window(rng: random.Random) -> Window:
    return Window(rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 1), rng.randint(0, 1))


def draw_pool(rng: random.Random) -> Window:
    kernel = rng.randint(1, 3)
    padding = rng.randint(0, kernel // 2)
    return Window(kernel, rng.randint(1, 4), padding, padding, ceil_mode=rng.random() < 0.5)


def draw_transposed(rng: random.Random) -> TransposedWindow:
    return TransposedWindow(rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 1))


def draw_resize(rng: random.Random) -> Resize:
    return Resize(rng.randint(1, 20), rng.uniform(0.4, 2), "linear")


DRAWS: dict[str, Callable[[random.Random], AxisWindow]] = {
    "conv": draw_window,
    "conv_transpose": draw_transposed,
    "max_pool": draw_pool,
    "avg_pool": draw_pool,
    "resize": draw_resize,
}


def computed(layer: LayerShape) -> OnPart:
    """The layer as a grid computes it."""
    windows = layer.windows
    groups = layer.groups
    rules: dict[str, OnPart] = {
        "conv": lambda part, own, channel: conv(part, own[0], None, windows, channel),  # type: ignore[arg-type]
        "conv_transpose": lambda part, own, channel: conv_transpose(
            part,
            own[0],
            None,
            windows,  # type: ignore[arg-type]
            channel,
        ),
        "max_pool": lambda part, _, channel: max_pool(part, windows, channel),  # type: ignore[arg-type]
        "avg_pool": lambda part, _, channel: avg_pool(part, windows, channel),  # type: ignore[arg-type]
        "resize": lambda part, _, channel: resize(part, windows, channel),  # type: ignore[arg-type]
        "batch_norm": lambda part, _, channel: batch_norm(part, None, None, channel),
        "group_norm": lambda part, _, channel: group_norm(part, groups, None, None, channel),
    }
    return rules[layer.kind]


def draw_layer(rng: random.Random, kind: str, source: LayerShape) -> LayerShape | None:
    """A layer that reads a source; None where it would give nothing."""
    groups = rng.choice([1, 2, 4]) if kind == "group_norm" else 1
    if kind not in DRAWS:
        return LayerShape("layer", kind, (source.name,), source.shape, groups=groups)  # type: ignore[arg-type]
    windows = tuple(DRAWS[kind](rng) for _ in source.space)
    space = [
        window.num_outputs(size) for window, size in zip(windows, source.space_sizes, strict=True)
    ]
    if min(space) < 1:
        return None
    kernel = [getattr(window, "kernel", 1) for window in windows]
    is_weighted = kind in ("conv", "conv_transpose")
    weights = FEATURES**2 * int(torch.tensor(kernel).prod()) if is_weighted else 0
    shape = (*source.shape[:2], *space)
    return LayerShape("layer", kind, (source.name,), shape, windows=windows, weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*DRAWS, "batch_norm", "group_norm"])
def test_traffic_of_a_layer(kind: str) -> None:
    rng, seen = random.Random(kind), Counter[str]()
    torch.manual_seed(0)
    for _ in range(CASES):
        shape = (rng.randint(1, 4), FEATURES, rng.randint(1, 12), rng.randint(1, 12))
        first = LayerShape("input", "input", (), shape)
        before = LayerShape("before", "conv", ("input",), shape, 1, (Window(1),) * 2, FEATURES**2)
        layer = draw_layer(rng, kind, before)
        if layer is None:
            continue
        shapes = ModelShapes((first, before, layer), ("layer",), shape[0], BYTES)
        batch, *space = (rng.choice([1, 1, 2, 3]) for _ in range(3))
        outputs = rng.choice([1, 2]) if not layer.is_weighted else 1
        procs = batch * space[0] * space[1] * outputs * rng.choice([1, 2])
        grids = [LayerGrid("before", batch, tuple(space), outputs)]
        if layer.is_weighted:
            grids.append(LayerGrid("layer", batch, tuple(space)))
        plan = GridPlan(procs, shape[0], tuple(grids))
        placement = place(shapes, plan)["layer"]
        layout = placement.reads[0]
        if layout != place(shapes, plan)["before"].output:
            continue  # moves of the whole tensor are counted too

        wanted = traffic(shapes, plan)["layer"]
        parameters = []
        if layer.is_weighted:
            kernel = [getattr(window, "kernel", 1) for window in layer.windows]
            parameters = [torch.randn(FEATURES, FEATURES, *kernel).double()]
        found = on_grid(
            computed(layer),
            layout,
            torch.randn(shape).double(),
            parameters,
            torch.randn(layer.shape).double(),
        )
        for way, sent in (("forward", wanted.forward), ("backward", wanted.backward)):
            counted = found.sent.get(way, Counted())  # type: ignore[call-overload]
            assert Sent(counted.messages, counted.num_bytes // BYTES) == sent, (layer, plan, way)
        seen["sends"] += wanted.forward.messages > 0
        seen["silent"] += wanted.forward.messages == 0
    assert seen["sends"] >= 8 and seen["silent"] >= 3, seen


@pytest.mark.parametrize("kind", ["conv", "batch_norm"])
def test_the_first_layer_sends_nothing_back(kind: str) -> None:
    """Nobody asks for the gradient of what the model is given."""
    shape = (2, FEATURES, 6, 6)
    windows = (Window(3, 1, 1, 1),) * 2 if kind == "conv" else ()
    first = LayerShape("input", "input", (), shape)
    layer = LayerShape("layer", kind, ("input",), shape, 1, windows, 9 * FEATURES**2)  # type: ignore[arg-type]
    last = LayerShape("last", "conv", ("layer",), shape, 1, (Window(1),) * 2, FEATURES**2)
    shapes = ModelShapes((first, layer, last), ("last",), 2, BYTES)
    grids = [LayerGrid(name, 1, (2, 2)) for name in ("layer", "last")]
    plan = GridPlan(4, 2, tuple(grids if kind == "conv" else grids[1:]))
    own = [torch.randn(FEATURES, FEATURES, 3, 3).double()]
    if kind == "batch_norm":
        own = [torch.randn(FEATURES).double(), torch.randn(FEATURES).double()]
    rules: dict[str, OnPart] = {
        "conv": computed(layer),
        "batch_norm": lambda part, own, channel: batch_norm(part, *own, channel),
    }
    found = on_grid(
        rules[kind],
        place(shapes, plan)["layer"].reads[0],
        torch.randn(shape).double(),
        own,
        torch.randn(shape).double(),
        input_needs_gradient=False,
    )
    wanted = traffic(shapes, plan)["layer"]
    counted = found.sent["forward"]
    assert Sent(counted.messages, counted.num_bytes // BYTES) == wanted.forward != Sent()
    assert "backward" not in found.sent
    assert wanted.backward == Sent()
