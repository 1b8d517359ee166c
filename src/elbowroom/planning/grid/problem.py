"""A model and its workers as a problem: ways to split each block, their costs, and the moves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.planning.grid.blocks import BlockGraph, Edge, block_graph
from elbowroom.planning.grid.costs import BlockCosts, BlockPricing, facts_of
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.moves import both_ways_seconds, made, read
from elbowroom.planning.grid.reduction import Costs, Followed, Solution, solve
from elbowroom.planning.grid.settings import GridSettings
from elbowroom.planning.grid.strategies import Floats, Strategies
from elbowroom.plans.grid import LayerGrid

Choices = tuple[int, ...]
"""For each block the row of its strategies."""


class GridProblem:
    """Blocks, the ways that each may be split, and their costs.

    ``ways`` are each block's; blocks alike may share one object, and then share prices.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        settings: GridSettings,
        ways: Sequence[Strategies],
        graph: BlockGraph | None = None,
    ) -> None:
        self.shapes = shapes
        self.settings = settings
        self.graph = graph or block_graph(shapes)
        self.ways = tuple(ways)

    @cached_property
    def costs(self) -> tuple[BlockCosts, ...]:
        known: dict[tuple[object, ...], BlockCosts] = {}
        for block, ways in zip(self.graph.blocks, self.ways, strict=True):
            key = (facts_of(block), id(ways))
            if key not in known:
                size = self.shapes.element_bytes
                known[key] = BlockPricing(block, ways, self.settings, size).costs()
        return tuple(
            known[facts_of(block), id(ways)]
            for block, ways in zip(self.graph.blocks, self.ways, strict=True)
        )

    @cached_property
    def moves(self) -> tuple[Floats, ...]:
        """For each edge the seconds of its moves, [strategies of its source, of its target]."""
        known: dict[tuple[object, ...], Floats] = {}
        found = []
        for edge in self.graph.edges:
            key = self._move_key(edge)
            if key not in known:
                known[key] = self._move(edge)
            found.append(known[key])
        return tuple(found)

    def _move(self, edge: Edge) -> Floats:
        source, target = self.graph.blocks[edge.source], self.graph.blocks[edge.target]
        return both_ways_seconds(
            self.settings.link,
            self.settings.procs,
            edge.layer,
            self.shapes.element_bytes,
            made(source, self.ways[edge.source], edge.is_pooled),
            read(target, self.ways[edge.target]),
        )

    def _move_key(self, edge: Edge) -> tuple[object, ...]:
        source, target = self.graph.blocks[edge.source], self.graph.blocks[edge.target]
        ends = (source.kind, source.head.kind, target.kind, target.head.kind)
        ways = (id(self.ways[edge.source]), id(self.ways[edge.target]))
        return (*ends, *ways, edge.layer.num_elements, edge.is_pooled)

    def best(self, weights_price: float = 1.0, memory_price: float = 0.0) -> Solution:
        """The choices that cost least where a byte of memory costs ``memory_price`` seconds, and
        what sums of weights take longer than the backward, under overlap, ``weights_price`` of it.
        """
        known: dict[int, Floats] = {}
        for costs in self.costs:
            if id(costs) not in known:
                known[id(costs)] = _own(costs, weights_price, memory_price, self.settings.overlap)
        edges: dict[tuple[int, int], Floats] = {}
        for edge, matrix in zip(self.graph.edges, self.moves, strict=True):
            pair = (edge.source, edge.target)
            edges[pair] = edges[pair] + matrix if pair in edges else matrix
        nodes = [known[id(costs)] for costs in self.costs]
        is_join = [block.kind == "plain" for block in self.graph.blocks]
        return solve(Costs(nodes, edges, is_join, self._followed))

    @cached_property
    def _followed(self) -> dict[int, Followed]:
        """For each join the block that it reads first, and which of its choices is which there."""
        found = {}
        for index, block in enumerate(self.graph.blocks):
            source = self.graph.main_source(index)
            if block.kind == "plain" and source is not None:
                alike = _alike(self.ways[source], self.ways[index])
                found[index] = Followed(source, alike)
        return found

    def choices_of(self, grids: Sequence[LayerGrid]) -> Choices | None:
        """The choices that are a grid for each block; None if some grid is no choice here."""
        rows = [ways.row_of(grid) for ways, grid in zip(self.ways, grids, strict=True)]
        known = tuple(row for row in rows if row is not None)
        return known if len(known) == len(rows) else None

    def grids(self, choices: Sequence[int]) -> tuple[LayerGrid, ...]:
        """The grid of each block."""
        return tuple(
            ways.grid(row, block.name, has_inputs=block.kind == "weighted")
            for block, ways, row in zip(self.graph.blocks, self.ways, choices, strict=True)
        )

    def terms(self, choices: Sequence[int]) -> tuple[GridTerms, ...]:
        """Each block's, the moves with the block whose output moves."""
        moved = [0.0] * len(choices)
        for edge, matrix in zip(self.graph.edges, self.moves, strict=True):
            moved[edge.source] += float(matrix[choices[edge.source], choices[edge.target]])
        return tuple(
            costs.terms(row, moves)
            for costs, row, moves in zip(self.costs, choices, moved, strict=True)
        )


def _own(costs: BlockCosts, weights_price: float, memory_price: float, overlap: bool) -> Floats:
    return np.asarray(
        costs.rest
        + costs.backward * (1 - weights_price if overlap else 1)
        + costs.weights * weights_price
        + costs.memory_bytes * memory_price
    )


def _alike(source: Strategies, own: Strategies) -> NDArray[np.intp]:
    """For each of the source's strategies the own one with the same layout of the output."""

    def keys(ways: Strategies) -> list[tuple[float, ...]]:
        rows = np.hstack([ways.batch[:, None], ways.space, ways.outputs[:, None]])
        return [tuple(row) for row in rows.tolist()]

    place = {key: row for row, key in enumerate(keys(own))}
    return np.array([place.get(key, -1) for key in keys(source)], dtype=np.intp)
