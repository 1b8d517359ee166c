"""The planner with the prices of a sketch, another program, whose tables it must find again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from elbowroom.core.known_nets import known_net
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.planning.grid.blocks import Block, Edge, block_graph
from elbowroom.planning.grid.costs import BlockCosts
from elbowroom.planning.grid.link import sum_seconds
from elbowroom.planning.grid.moves import Spread, made, read
from elbowroom.planning.grid.problem import GridProblem
from elbowroom.planning.grid.settings import KNL, Forms, GridSettings
from elbowroom.planning.grid.strategies import Floats, Strategies, all_strategies


def simpler_problem(
    net: str,
    procs: int,
    batch: int,
    forms: Forms,
    most_feature_parts: int | None = None,
    is_sketched: bool = True,
) -> SimplerProblem:
    """A known network on the paper's machine, with the sketch's prices.

    ``most_feature_parts``: of outputs and inputs together, which the sketch cut its list at.
    ``is_sketched``: whether the network, too, is as the sketch read it.
    """
    shapes = known_net(net).for_batch(batch)
    if is_sketched:
        shapes = as_sketched(shapes)
    graph = block_graph(shapes)
    ways = all_strategies(graph, procs, batch, forms)
    if most_feature_parts is not None:
        ways = _cut(ways, most_feature_parts)
    return SimplerProblem(shapes, GridSettings(procs, batch, KNL, forms), ways, graph)


def as_sketched(shapes: ModelShapes) -> ModelShapes:
    """A network as the sketch read it.

    A cat may be split in its features as an add may. Where several layers read a pooling, it runs
    before its output moves to them: a layer that does nothing stands between.
    """
    layers: list[LayerShape] = []
    renamed: dict[str, str] = {}
    for layer in shapes.layers:
        kind = "elementwise" if layer.kind == "cat" else layer.kind
        sources = tuple(renamed.get(name, name) for name in layer.sources)
        layers.append(replace(layer, kind=kind, sources=sources))
        if layer.kind == "max_pool" and len(shapes.readers[layer.name]) > 1:
            renamed[layer.name] = f"{layer.name}.fork"
            layers.append(LayerShape(renamed[layer.name], "pointwise", (layer.name,), layer.shape))
    return replace(shapes, layers=tuple(layers))


def _cut(ways: Sequence[Strategies], most_feature_parts: int) -> tuple[Strategies, ...]:
    """Strategies of few parts of features; blocks that shared an object share one."""
    known: dict[int, Strategies] = {}
    for each in ways:
        few = each.outputs * each.inputs <= most_feature_parts
        rows = (each.batch[few], each.space[few], each.outputs[few], each.inputs[few])
        known.setdefault(id(each), Strategies(*rows))
    return tuple(known[id(each)] for each in ways)


class SimplerProblem(GridProblem):
    """Blocks with the sketch's prices.

    A move goes from where a layer computes straight to where the next reads. Summands are added
    behind the poolings, and the last layer's for nothing; a gradient goes straight to all that
    computed summands of its tensor. Norms have no weights; their statistics are summed over parts
    of the batch and of space, not over those that the inputs' summands are scattered to. Biases
    are split as weights are. A pooled sum is an all-reduce forward, and free backward.
    """

    def milliseconds(self) -> float:
        """Communication of the best plan."""
        return self.milliseconds_of(self.best().choices)

    def milliseconds_of(self, choices: Sequence[int]) -> float:
        return 1e3 * sum(each.communication for each in self.terms(choices))

    @cached_property
    def costs(self) -> tuple[BlockCosts, ...]:
        known: dict[int, BlockCosts] = {}  # blocks alike share an object, and then its prices
        shipped = super().costs
        for block, ways, costs in zip(self.graph.blocks, self.ways, shipped, strict=True):
            if id(costs) not in known:
                known[id(costs)] = self._simpler(block, ways, costs)
        return tuple(known[id(costs)] for costs in shipped)

    def _simpler(self, block: Block, ways: Strategies, costs: BlockCosts) -> BlockCosts:
        link, count = self.settings.link, ways.batch * ways.area
        held = 4 * (block.head.weights + block.head.biases) / (ways.outputs * ways.inputs)
        norms = sums = np.zeros(ways.count)
        for layer, _ in block.followers:
            if layer.kind == "batch_norm":
                statistics = 2 * 4 * layer.num_features / ways.outputs
                norms = norms + 2 * sum_seconds(link, count, statistics)
            elif layer.kind == "global_pool":
                num_bytes = 4 * layer.num_elements / (ways.batch * ways.outputs)
                sums = sums + sum_seconds(link, ways.area, num_bytes)
        weights = np.where(held > 0, sum_seconds(link, count, held), 0.0)
        return costs._replace(weights=weights, norms=norms, sums=sums)

    @cached_property
    def moves(self) -> tuple[Floats, ...]:
        known: dict[tuple[object, ...], Floats] = {}
        keys = [self._alike(edge) for edge in self.graph.edges]
        for key, edge in zip(keys, self.graph.edges, strict=True):
            if key not in known:
                known[key] = self._both_ways(edge)
        return tuple(known[key] for key in keys)

    def _alike(self, edge: Edge) -> tuple[object, ...]:
        """Edges of which this is equal have equal prices."""
        ends = [
            (self.graph.blocks[block].kind, id(self.ways[block]))
            for block in (edge.source, edge.target)
        ]
        return (*ends, edge.layer.num_elements)

    def _both_ways(self, edge: Edge) -> Floats:
        source = made(self.graph.blocks[edge.source], self.ways[edge.source])
        target = read(self.graph.blocks[edge.target], self.ways[edge.target])
        if source.parts.shape[1] != target.parts.shape[1]:
            source, target = source.without_space(), target.without_space()
        num_bytes = 4.0 * edge.layer.num_elements
        forward = self._straight(source, target, num_bytes)
        return np.asarray(forward + self._straight(target, source, num_bytes).T)

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
