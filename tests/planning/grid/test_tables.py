"""The tables of ``docs/grid-reproduction.md``: milliseconds on the paper's machine."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import pytest

from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.blocks import block_graph
from elbowroom.planning.grid.costs import BlockCosts
from elbowroom.planning.grid.moves import Spread, made, read
from elbowroom.planning.grid.paper import PaperForms
from elbowroom.planning.grid.plan import plan_grid
from elbowroom.planning.grid.problem import GridProblem
from elbowroom.planning.grid.settings import KNL, Forms, GridSettings
from elbowroom.planning.grid.strategies import Floats, all_strategies

KNL_FLOPS = 2.9e12
"""Of a KNL: AlexNet's 0.6 s for 256 samples (1609.06870)."""


class Row(NamedTuple):
    net: str
    procs: int
    batch: int
    linear: float
    all: float


OURS = [
    Row("alexnet", 8, 2048, 21.48, 21.48),
    Row("alexnet", 32, 2048, 14.43, 14.43),
    Row("alexnet", 128, 2048, 9.672, 9.672),
    Row("alexnet", 512, 2048, 7.2, 5.748),
    Row("alexnet", 512, 512, 6.02, 2.831),
    Row("alexnet", 4096, 512, 5.831, 1.143),
    Row("vgg16", 8, 256, 20.54, 20.54),
    Row("vgg16", 512, 2048, 23.14, 19.42),
    Row("vgg16", 512, 512, 21.29, 11.35),
    Row("vgg16", 512, 64, 20.87, 4.787),
]
SIMPLER = [
    Row("alexnet", 8, 2048, 19.76, 19.76),
    Row("alexnet", 32, 2048, 13.47, 13.47),
    Row("alexnet", 128, 2048, 9.14, 9.14),
    Row("alexnet", 512, 2048, 6.95, 4.96),
    Row("alexnet", 512, 512, 5.89, 2.40),
    Row("alexnet", 1024, 512, 5.89, 1.70),
    Row("alexnet", 2048, 512, 5.82, 1.25),
    Row("alexnet", 4096, 512, 5.75, 0.95),
    Row("vgg16", 8, 256, 20.23, 20.23),
    Row("vgg16", 512, 2048, 22.90, 17.78),
    Row("vgg16", 512, 512, 21.16, 10.17),
    Row("vgg16", 512, 64, 20.82, 4.22),
]


def milliseconds(row: Row, forms: Forms, rate: float | None = None) -> float:
    planned = plan_grid(
        known_net(row.net), row.procs, row.batch, KNL, forms=forms, flops_per_second=rate
    )
    return 1e3 * planned.plan.prediction.seconds


@pytest.mark.parametrize("row", OURS)
def test_our_plans_take_these_milliseconds(row: Row) -> None:
    assert milliseconds(row, "linear") == pytest.approx(row.linear, rel=3e-4)
    assert milliseconds(row, "all") == pytest.approx(row.all, rel=3e-4)


@pytest.mark.parametrize("row", OURS)
def test_they_beat_the_papers_best_form(row: Row) -> None:
    paper = PaperForms(known_net(row.net).for_batch(row.batch), row.procs, KNL).best()
    assert paper is not None
    assert row.all <= row.linear < 1e3 * paper.seconds


@pytest.mark.parametrize(("procs", "batch"), [(8, 256), (512, 2048), (512, 512)])
def test_with_overlap_vgg16_takes_little_more_than_its_products(procs: int, batch: int) -> None:
    planned = plan_grid(
        known_net("vgg16"), procs, batch, KNL, forms="linear", flops_per_second=KNL_FLOPS
    )
    weighted = known_net("vgg16").weighted
    flops = (3 * sum(layer.flops for layer in weighted) - weighted[0].flops) * batch / procs
    floor = flops / KNL_FLOPS
    assert floor * (1 - 1e-9) <= planned.plan.prediction.seconds <= 1.1 * floor
    batch_seconds = planned.explanation.batch_seconds
    assert batch_seconds is not None and planned.plan.prediction.seconds <= batch_seconds


class SimplerProblem(GridProblem):
    """Moves as a sketch priced them: from where a layer computes straight to where the next reads.

    Sums are added behind the poolings, and the last layer's for nothing; a gradient goes straight
    to all that computed summands of its tensor; biases are split as weights are.
    """

    @cached_property
    def costs(self) -> tuple[BlockCosts, ...]:
        found = []
        for block, ways, costs in zip(self.graph.blocks, self.ways, super().costs, strict=True):
            count = ways.batch * ways.area
            held = 4 * (block.head.weights + block.head.biases) / (ways.outputs * ways.inputs)
            once = 2e-6 * np.ceil(np.log2(count)) + held * (count - 1) / count / 6e9
            found.append(costs._replace(weights=2 * once, sums=np.zeros_like(costs.sums)))
        return tuple(found)

    @cached_property
    def moves(self) -> tuple[Floats, ...]:
        found = []
        for edge in self.graph.edges:
            source = made(self.graph.blocks[edge.source], self.ways[edge.source])
            target = read(self.graph.blocks[edge.target], self.ways[edge.target])
            if source.parts.shape[1] != target.parts.shape[1]:
                source, target = source.without_space(), target.without_space()
            num_bytes = 4.0 * edge.layer.num_elements
            forward = self._straight(source, target, num_bytes)
            found.append(forward + self._straight(target, source, num_bytes).T)
        return tuple(found)

    def _straight(self, source: Spread, target: Spread, num_bytes: float) -> Floats:
        """Seconds for each pair, one row of the source's strategies after the other."""
        rows = []
        for parts, pending in zip(source.parts, source.pending, strict=True):
            spread = parts[None, :] * np.ones_like(target.parts)
            left = np.full(len(target.parts), pending)
            for dim in range(spread.shape[1]):
                factor = np.clip(target.parts[:, dim] / parts[dim], 1, left)
                spread[:, dim] *= factor
                left = left / factor
            spread[:, 0] *= left
            finest, wanted = np.maximum(spread, target.parts).prod(1), target.parts.prod(1)
            gathered = np.minimum(finest / wanted, self.settings.procs / wanted)
            messages = np.ceil(np.log2(gathered)) + finest / wanted / gathered - 1
            seconds = 2e-6 * messages + num_bytes * (1 / wanted - 1 / finest) / 6e9
            seconds[finest <= wanted] = 0.0
            if pending > 1:
                share = num_bytes / parts.prod()
                seconds = seconds + 2e-6 * np.ceil(np.log2(pending))
                seconds = seconds + share * (pending - 1) / pending / 6e9
            rows.append(seconds)
        return np.stack(rows)


@pytest.mark.parametrize("row", SIMPLER)
@pytest.mark.parametrize("forms", ["linear", "all"])
def test_with_a_simpler_price_of_moves_another_program_found_the_same(
    row: Row, forms: Forms
) -> None:
    shapes = known_net(row.net).for_batch(row.batch)
    graph = block_graph(shapes)
    settings = GridSettings(row.procs, row.batch, KNL, forms)
    ways = all_strategies(graph, row.procs, row.batch, forms)
    problem = SimplerProblem(shapes, settings, ways, graph)
    terms = problem.terms(problem.best().choices)
    found = 1e3 * sum(each.communication for each in terms)
    assert found == pytest.approx(getattr(row, forms), abs=0.0051)
