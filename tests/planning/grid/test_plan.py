"""Plans of grids: the best of all, within memory, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.known_nets import KNOWN_NETS, known_net
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.planning.grid.blocks import block_graph
from elbowroom.planning.grid.paper import PaperForms
from elbowroom.planning.grid.plan import explain_grid, plan_grid
from elbowroom.planning.grid.problem import GridProblem
from elbowroom.planning.grid.settings import KNL, Forms, GridLink, GridSettings
from elbowroom.planning.grid.strategies import all_strategies
from elbowroom.plans.grid import GridPlan
from elbowroom.plans.grid_placement import place
from elbowroom.plans.grid_traffic import traffic
from tests.planning.grid.models import Shapes, convolutions, perceptron, residual, tangled

SLOW = GridLink(1e-5, 1e8)
BYTES_ONLY = GridLink(0.0, 1.0)


class AllPlans:
    """Every combination of every layer's strategies, added up term by term."""

    def __init__(self, shapes: ModelShapes, settings: GridSettings) -> None:
        graph = block_graph(shapes)
        ways = all_strategies(graph, settings.procs, settings.batch, settings.forms)
        self.problem = GridProblem(shapes, settings, ways, graph)
        self.dims = len(ways)
        self.count = int(np.prod([each.count for each in ways]))

    def sum(self, name: str) -> np.ndarray:
        """One term of all plans, an axis for each block."""
        parts = [self._along(getattr(each, name), n) for n, each in enumerate(self.problem.costs)]
        return np.asarray(reduce(np.add, parts))

    def moves(self) -> np.ndarray:
        parts = [
            self._along(matrix, edge.source, edge.target)
            for edge, matrix in zip(self.problem.graph.edges, self.problem.moves, strict=True)
        ]
        return np.asarray(reduce(np.add, parts))

    def seconds(self) -> np.ndarray:
        """Of an iteration, with overlap if the settings say so."""
        rest = self.moves()
        for name in ("halo", "norms", "sums", "forward"):
            rest = rest + self.sum(name)
        weights, backward = self.sum("weights"), self.sum("backward")
        hidden = np.minimum(weights, backward) if self.problem.settings.overlap else 0.0
        return np.asarray(rest + weights + backward - hidden)

    def _along(self, array: np.ndarray, *blocks: int) -> np.ndarray:
        shape = [1] * self.dims
        for block, size in zip(blocks, array.shape, strict=True):
            shape[block] = size
        return array.reshape(shape)


INSTANCES = [
    (convolutions(16, 8, 4, 16, 16, 32, 32, 16), 4),
    (perceptron(64, 512, 256, 256, 512, 128, 64), 8),
    (convolutions(6, 6, 6, 16, 16, 16, 16), 6),
    (residual(6, channels=6), 6),
    (tangled(8), 2),
    (convolutions(8, 8, 8, 64, 64, 64), 8),
]


@pytest.mark.parametrize(("shapes", "procs"), INSTANCES)
def test_the_plan_is_the_best_of_all(shapes: ModelShapes, procs: int) -> None:
    everything = AllPlans(shapes, GridSettings(procs, shapes.batch, SLOW))
    assert everything.count >= 65_536
    planned = plan_grid(shapes, procs, shapes.batch, SLOW)
    best = everything.seconds().min()
    assert planned.plan.prediction.seconds == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("rate", [1e8, 1e9, 1e10, 1e11])
@pytest.mark.parametrize(("shapes", "procs"), INSTANCES[:4])
def test_with_overlap_it_is_within_a_percent(shapes: ModelShapes, procs: int, rate: float) -> None:
    settings = GridSettings(procs, shapes.batch, SLOW, flops_per_second=rate)
    planned = plan_grid(shapes, procs, shapes.batch, SLOW, flops_per_second=rate)
    best = AllPlans(shapes, settings).seconds().min()
    assert best * (1 - 1e-12) <= planned.plan.prediction.seconds <= best * 1.01
    if planned.explanation.is_exact:
        assert planned.plan.prediction.seconds == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("shapes", "procs"), INSTANCES[:4])
def test_a_limit_of_memory_is_kept(shapes: ModelShapes, procs: int, share: float) -> None:
    everything = AllPlans(shapes, GridSettings(procs, shapes.batch, SLOW))
    memory, seconds = everything.sum("memory_bytes"), everything.seconds()
    least = float(memory.min())
    free = float(memory.reshape(-1)[seconds.argmin()])
    limit = int(np.ceil(least + share * (free - least)))
    planned = plan_grid(shapes, procs, shapes.batch, SLOW, memory_bytes=limit)
    assert planned.plan.prediction.memory_bytes <= limit
    best = seconds[memory <= limit].min()
    assert best * (1 - 1e-12) <= planned.plan.prediction.seconds <= best * 1.1
    with pytest.raises(MemoryPlanError):
        plan_grid(shapes, procs, shapes.batch, SLOW, memory_bytes=int(least) - 1)


@pytest.mark.parametrize("forms", ["paper", "linear", "all"])
@pytest.mark.parametrize("net", KNOWN_NETS)
def test_a_plan_runs_on_the_model_and_is_explained(net: str, forms: Forms) -> None:
    shapes = known_net(net)
    planned = plan_grid(shapes, 8, 64, KNL, forms=forms, flops_per_second=2.9e12)
    place(shapes.for_batch(64), planned.plan)
    assert {layer.name for layer in shapes.weighted} <= planned.plan.grid_of.keys()
    assert GridPlan.from_json(planned.plan.to_json()) == planned.plan
    settings = GridSettings(8, 64, KNL, flops_per_second=2.9e12)
    again = explain_grid(shapes, planned.plan, settings)
    assert again.seconds == pytest.approx(planned.plan.prediction.seconds, rel=1e-9)
    explained = planned.explanation
    assert explained.total.memory_bytes == pytest.approx(planned.plan.prediction.memory_bytes)
    names = {layer.grid.name for layer in explained.layers}
    followers = {name for layer in explained.layers for name in layer.followers}
    assert names | followers | {"input"} == set(shapes.by_name)


@pytest.mark.parametrize(
    ("shapes", "procs", "batch"),
    [*((shapes, procs, shapes.batch) for shapes, procs in INSTANCES), (known_net("unet3d"), 64, 4)],
)
def test_joins_and_forks_are_named_where_they_lie_otherwise(
    shapes: ModelShapes, procs: int, batch: int
) -> None:
    planned = plan_grid(shapes, procs, batch, SLOW)
    again = explain_grid(shapes, planned.plan, GridSettings(procs, batch, SLOW))
    assert again.seconds == pytest.approx(planned.plan.prediction.seconds, rel=1e-12)
    assert [layer.grid for layer in again.layers] == [
        layer.grid for layer in planned.explanation.layers
    ]


def test_the_papers_terms_are_its_closed_forms() -> None:
    shapes = known_net("alexnet")
    explained = plan_grid(shapes, 4096, 512, KNL).explanation
    paper = PaperForms(shapes.for_batch(512), 4096, KNL).best()
    assert paper is not None
    found = [layer.paper for layer in explained.layers]
    assert all(each is not None for each in found)
    halo, weights = (sum(getattr(each, name) for each in found) for name in ("halo", "weights"))
    assert halo == pytest.approx(sum(each.halo for each in paper.terms)) and halo > 0
    assert weights == pytest.approx(sum(each.weights for each in paper.terms))
    assert explained.paper_seconds == pytest.approx(paper.seconds)


@pytest.mark.parametrize(("net", "procs", "batch"), [("vgg16", 8, 16), ("alexnet", 4, 16)])
def test_bytes_are_those_that_the_layouts_move(net: str, procs: int, batch: int) -> None:
    """Counted from the boxes of all workers, of plans that have nothing to do with the best one."""
    shapes = known_net(net).for_batch(batch)
    everything = AllPlans(shapes, GridSettings(procs, batch, BYTES_ONLY))
    generator = np.random.default_rng(3)
    for _ in range(4):
        choices = [int(generator.integers(ways.count)) for ways in everything.problem.ways]
        plan = GridPlan(procs, batch, everything.problem.grids(choices))
        sent = traffic(shapes, plan).values()
        found = explain_grid(shapes, plan, GridSettings(procs, batch, BYTES_ONLY)).total
        moved = sum(each.forward.elements + each.backward.elements for each in sent)
        summed = sum(each.update.elements for each in sent)
        assert procs * found.weights == pytest.approx(4 * summed, rel=0.02)
        assert procs * (found.communication - found.weights) == pytest.approx(4 * moved, rel=0.15)


def test_messages_of_few_workers_are_counted() -> None:
    shapes = known_net("alexnet").for_batch(64)
    plan = plan_grid(shapes, 8, 64, KNL).plan
    sent = [each for of_layer in traffic(shapes, plan).values() for each in of_layer]
    assert plan.prediction.messages == sum(each.messages for each in sent)
    assert plan.prediction.num_bytes == 4 * sum(each.elements for each in sent)


def test_predicted_bytes_are_those_of_a_link_without_latency() -> None:
    planned = plan_grid(known_net("alexnet"), 128, 256, KNL)
    seconds = planned.plan.prediction.communication_seconds
    per_worker = planned.plan.prediction.messages * 2e-6 + planned.plan.prediction.num_bytes / 6e9
    assert seconds == pytest.approx(per_worker / 128, rel=1e-6)


def test_more_freedom_is_never_slower() -> None:
    def seconds(forms: Forms, rate: float | None) -> float:
        found = plan_grid(known_net("vgg16"), 64, 128, KNL, forms=forms, flops_per_second=rate)
        return found.plan.prediction.seconds

    for rate in (None, 2.9e12):
        assert seconds("all", rate) <= seconds("linear", rate) <= seconds("paper", rate)


def test_fewer_samples_than_workers_are_planned() -> None:
    planned = plan_grid(convolutions(3, 8, 3, 16, 16), 8, 3, KNL)
    assert all(grid.batch <= 3 for grid in planned.plan.layers)
    assert planned.explanation.batch_seconds is None


def test_a_layer_without_a_rule_is_named() -> None:
    net = Shapes(16, batch=8)
    odd = net.like("odd", "whole", net.linear("fc", "input", 16))
    shapes = net.built(net.linear("end", odd, 16))
    planned = plan_grid(shapes, 4, 8, KNL)
    assert planned.explanation.whole == ("odd",)
    assert "odd" not in planned.plan.grid_of
    place(shapes, planned.plan)


def test_attention_is_split_by_heads_and_embeddings_by_features() -> None:
    net = Shapes(16, 32, batch=8)
    norm = net.like("norm", "layer_norm", net.linear("fc", "input", 32), biases=64)
    attention = net.like("attention", "attention", norm, groups=4)
    added = net.like("add", "elementwise", attention, norm)
    shapes = net.built(net.linear("end", added, 32))
    layers = [
        replace(layer, weights=10**7) if layer.name == "attention" else layer
        for layer in shapes.layers
    ]
    planned = plan_grid(replace(shapes, layers=tuple(layers)), 8, 8, KNL)
    assert planned.plan.grid_of["attention"].outputs == 4
    place(shapes, planned.plan)
    paper = plan_grid(replace(shapes, layers=tuple(layers)), 64, 64, KNL, forms="paper").plan
    assert paper.grid_of["attention"].outputs <= 4


def test_a_model_without_weights_is_refused() -> None:
    net = Shapes(16, batch=8)
    with pytest.raises(InputError):
        plan_grid(net.built(net.like("relu", "pointwise", "input")), 4, 8, KNL)


@pytest.mark.parametrize(
    ("procs", "batch", "changes"),
    [
        (0, 8, {}),
        (8, 0, {}),
        (8, 8, {"forms": "some"}),
        (8, 8, {"flops_per_second": 0.0}),
        (8, 8, {"memory_bytes": 0}),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    procs: int, batch: int, changes: dict[str, object]
) -> None:
    with pytest.raises(InputError):
        plan_grid(known_net("alexnet"), procs, batch, KNL, **changes)  # type: ignore[arg-type]


def test_a_plan_of_fewer_layers_is_refused() -> None:
    shapes = perceptron(8, 16, 16, 16)
    plan = plan_grid(shapes, 4, 8, KNL).plan
    settings = GridSettings(4, 8, KNL)
    with pytest.raises(InputError):
        explain_grid(shapes, replace(plan, layers=plan.layers[:1]), settings)
    moved = replace(plan.layers[0], name="relu0")
    with pytest.raises(InputError):
        explain_grid(shapes, replace(plan, layers=(*plan.layers, moved)), settings)


def test_a_table_that_reads_constants_is_planned() -> None:
    net = Shapes(16, 32, batch=8)
    first = net.linear("fc", "input", 32)
    layers = list(net.built(net.like("add", "elementwise", first, first)).layers)
    table = replace(layers[1], name="positions", kind="embedding", sources=())
    layers[2] = replace(layers[2], sources=("fc", "positions"))
    shapes = ModelShapes((*layers[:2], table, layers[2]), ("add",), 8)
    for forms in ("paper", "linear", "all"):
        planned = plan_grid(shapes, 4, 8, KNL, forms=forms)  # type: ignore[arg-type]
        assert "positions" in planned.plan.grid_of
