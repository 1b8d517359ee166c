"""Terms of a block's cost, worked out by hand."""

from __future__ import annotations

from math import log2

import pytest

from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.core.windows import Resize, TransposedWindow, Window, exchange
from elbowroom.planning.grid.blocks import block_graph
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.halo import border
from elbowroom.planning.grid.plan import explain_grid
from elbowroom.planning.grid.settings import GridLink, GridSettings
from elbowroom.plans.grid import GridPlan, LayerGrid
from tests.planning.grid.models import Shapes, convolutions, perceptron, residual

LATENCY, BANDWIDTH = 1e-5, 1e9
LINK = GridLink(LATENCY, BANDWIDTH)


def terms(
    shapes: ModelShapes, procs: int, *grids: LayerGrid, rate: float | None = None
) -> dict[str, GridTerms]:
    settings = GridSettings(procs, shapes.batch, LINK, flops_per_second=rate)
    found = explain_grid(shapes, GridPlan(procs, shapes.batch, grids), settings)
    return {layer.grid.name: layer.terms for layer in found.layers}


def collective(workers: int, num_bytes: float) -> float:
    """A gather, or a scatter of sums, of ``num_bytes`` in all."""
    return LATENCY * log2(workers) + num_bytes / BANDWIDTH * (workers - 1) / workers


def test_gradients_of_weights_are_summed_over_batch_and_space() -> None:
    shapes = convolutions(8, 8, 3, 16, 16)
    split = LayerGrid("conv1", 2, (2, 1), 2)
    found = terms(shapes, 8, LayerGrid("conv0", 8, (1, 1)), split, LayerGrid("fc", 1, (), 2, 4))
    assert found["conv0"].weights == pytest.approx(2 * collective(8, 4 * 3 * 16 * 9))
    assert found["conv1"].weights == pytest.approx(2 * collective(4, 4 * 16 * 16 * 9 / 2))
    assert found["fc"].weights == 0  # one worker has each part


def test_border_rows_are_fetched_forward_and_backward() -> None:
    shapes = convolutions(4, 8, 3, 16, 16)
    split = (2, 2)
    grids = (LayerGrid("conv0", 1, split), LayerGrid("conv1", 1, split), LayerGrid("fc", 4))
    found = terms(shapes, 4, *grids)
    one_way = 2 * LATENCY + 2 * 4 * (4 * 4 * 16) / BANDWIDTH  # rows of 4, both sides counted
    assert found["conv1"].halo == pytest.approx(2 * 2 * one_way)
    assert found["conv0"].halo == pytest.approx(2 * (2 * LATENCY + 2 * 4 * 4 * 4 * 3 / BANDWIDTH))


def test_summands_are_scattered_and_their_gradient_is_gathered() -> None:
    shapes = perceptron(8, 32, 16, 16)
    found = terms(shapes, 4, LayerGrid("fc0", 1, (), 1, 4), LayerGrid("fc1", 4))
    # fc0: to the batch, where fc1 reads it; and back.
    assert found["fc0"].moves == pytest.approx(2 * collective(4, 4 * 8 * 16))
    assert found["fc1"].moves == 0
    assert found["fc1"].weights == pytest.approx(2 * collective(4, 4 * 16 * 16))


def test_columns_then_rows_move_nothing_forward_but_the_sums() -> None:
    shapes = perceptron(8, 32, 16, 16)
    found = terms(shapes, 4, LayerGrid("fc0", 1, (), 4), LayerGrid("fc1", 1, (), 1, 4))
    assert found["fc0"].moves == 0
    assert found["fc1"].moves == pytest.approx(2 * collective(4, 4 * 8 * 16))


def test_a_gradient_is_summed_and_then_brought_to_its_tensor() -> None:
    """fc0 in two parts of the batch, twice; fc1 in four parts of its outputs, on whole inputs."""
    shapes = perceptron(8, 32, 16, 16)
    found = terms(shapes, 4, LayerGrid("fc0", 2), LayerGrid("fc1", 1, (), 4))
    tensor = 4 * 8 * 16
    to_half = LATENCY + tensor * (1 / 2 - 1 / 4) / BANDWIDTH
    assert found["fc0"].moves == pytest.approx(
        collective(2, tensor) + collective(4, tensor) + to_half
    )


def test_a_global_pool_sums_over_space_to_where_it_is_read() -> None:
    shapes = residual(8)
    grids = [LayerGrid(name, 1, (2, 2)) for name in ("stem", "branch")]
    found = terms(shapes, 4, *grids, LayerGrid("fc", 4))
    assert found["add"].moves == pytest.approx(2 * collective(4, 4 * 8 * 16))
    assert found["branch"].moves == 0


def test_the_loss_needs_all_features_of_a_row() -> None:
    shapes = perceptron(8, 32, 16)
    found = terms(shapes, 4, LayerGrid("fc0", 1, (), 4))
    assert found["fc0"].moves == pytest.approx(collective(4, 4 * 8 * 16))


def test_norms_sum_their_statistics_twice_forward_and_backward() -> None:
    shapes = residual(8)
    grids = [LayerGrid(block.name, 4) for block in block_graph(shapes).blocks]
    found = terms(shapes, 4, *grids)
    assert found["branch"].norms == pytest.approx(2 * 2 * collective(4, 4 * 2 * 16))
    assert found["branch"].weights == pytest.approx(2 * collective(4, 4 * (16 * 16 * 9 + 32)))
    assert found["add"] == GridTerms()


def test_products_take_their_largest_part() -> None:
    shapes = perceptron(7, 10, 9)
    found = terms(shapes, 8, LayerGrid("fc0", 2, (), 2, 2), rate=1e6)["fc0"]
    largest = 4 * 5 * 5  # samples, outputs and inputs of the worker that has most
    assert found.forward == pytest.approx(2 * largest / 1e6)
    assert found.backward == pytest.approx(2 * largest / 1e6)  # nothing reads the input's gradient


def test_measured_seconds_are_taken_before_a_rate() -> None:
    shapes = perceptron(8, 10, 10)
    layer = shapes.layers[1]
    object.__setattr__(layer, "forward_seconds", 0.5)
    object.__setattr__(layer, "backward_seconds", 1.5)
    found = terms(shapes, 2, LayerGrid("fc0", 2), rate=1e6)["fc0"]
    assert (found.forward, found.backward) == (0.25, 0.75)


def test_memory_is_of_weights_gradients_momentum_and_activations() -> None:
    shapes = perceptron(8, 32, 16)
    found = terms(shapes, 8, LayerGrid("fc0", 2, (), 2, 2))["fc0"]
    assert found.memory_bytes == 4 * (3 * 32 * 16 / 4 + 8 * 32 / 4 + 8 * 16 / 4)


def test_a_layer_without_a_rule_is_gathered_and_runs_everywhere() -> None:
    net = Shapes(16, batch=8)
    odd = net.like("odd", "whole", net.linear("fc", "input", 16))
    shapes = net.built(net.linear("end", odd, 16))
    found = terms(shapes, 4, LayerGrid("fc", 4), LayerGrid("end", 4))
    tensor = 4 * 8 * 16
    assert found["fc"].moves == pytest.approx(collective(4, tensor))
    assert found["odd"].moves == pytest.approx(collective(4, tensor))  # its gradient


@pytest.mark.parametrize(("size", "parts", "kernel"), [(16, 4, 3), (16, 2, 5), (24, 4, 7)])
def test_the_closed_form_of_a_border_is_what_a_part_inside_takes(
    size: int, parts: int, kernel: int
) -> None:
    window = Window(kernel, 1, kernel // 2, kernel // 2)
    plan = exchange(window, size, parts)
    inside = parts // 2 if parts > 2 else 0
    rows = plan.num_wanted(inside) - plan.own[inside].size
    sides = 2 if parts > 2 else 1
    assert border(window, size, parts).rows * sides / 2 == rows


def test_other_windows_are_counted() -> None:
    assert border(TransposedWindow(2, stride=2), 8, 4).rows == 0
    assert border(TransposedWindow(4, stride=2, padding=1), 8, 4) == (2, 2)
    assert border(Resize(16, 0.5, "linear"), 8, 2).rows == 1
    assert border(Window(3, 1, 1, 1), 8, 1) == (0, 0)
