"""What any grid plan costs, layer by layer, beside a plan by batch and the paper's best form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.planning.grid.blocks import Block, BlockGraph, block_graph
from elbowroom.planning.grid.choice import hidden_seconds, judged_seconds
from elbowroom.planning.grid.explanation import GridExplanation, GridTerms, LayerExplanation
from elbowroom.planning.grid.paper import PaperForms
from elbowroom.planning.grid.problem import GridProblem
from elbowroom.planning.grid.settings import GridSettings
from elbowroom.planning.grid.strategies import Strategies
from elbowroom.plans.grid import LayerGrid


class GridPricing:
    """Prices of plans for one model, whose shapes are those of the whole minibatch."""

    def __init__(
        self, shapes: ModelShapes, settings: GridSettings, graph: BlockGraph | None = None
    ) -> None:
        self.shapes, self.settings = shapes, settings
        self.graph = graph or block_graph(shapes)

    def grids(self, named: Mapping[str, LayerGrid]) -> tuple[LayerGrid, ...]:
        """Each block's. One that is not named lies as what it reads first does.

        Raises InputError for a plan that leaves out a layer with weights.
        """
        found: list[LayerGrid] = []
        for index, block in enumerate(self.graph.blocks):
            source = self.graph.main_source(index)
            if block.name in named:
                found.append(_fitted(named[block.name], block))
            elif block.kind == "weighted":
                raise InputError(f"the plan has no grid for layer '{block.name}': plan again")
            elif block.kind == "whole" or source is None:
                found.append(_fitted(LayerGrid(block.name), block))
            else:
                found.append(followed(found[source], block))
        return tuple(found)

    def terms(self, grids: Sequence[LayerGrid]) -> tuple[GridTerms, ...]:
        """Each block's, from the grid of each."""
        ways = [Strategies.of([(g.batch, g.space, g.outputs, g.inputs)]) for g in grids]
        return GridProblem(self.shapes, self.settings, ways, self.graph).terms([0] * len(ways))

    @cached_property
    def paper(self) -> PaperForms:
        return PaperForms(self.shapes, self.settings.procs, self.settings.link)

    @cached_property
    def batch_terms(self) -> tuple[GridTerms, ...] | None:
        """Of the plan that splits the batch alone; None where it has too few samples."""
        plan = self.paper.batch()
        return self.terms(self.grids(plan.by_name)) if plan else None

    @cached_property
    def paper_terms(self) -> dict[str, GridTerms] | None:
        """Of the paper's best form by its closed forms, by layer, with the products of our terms.

        Norms, joins, and moves between unlike grids are free in it.
        """
        plan = self.paper.best()
        if plan is None:
            return None
        names = (block.name for block in self.graph.blocks)
        ours = dict(zip(names, self.terms(self.grids(plan.by_name)), strict=True))
        return {
            grid.name: replace(
                ours[grid.name],
                halo=each.halo,
                weights=each.weights,
                norms=0.0,
                moves=each.gather + each.inputs,
            )
            for grid, each in zip(plan.layers, plan.terms, strict=True)
        }

    def explain(self, grids: Sequence[LayerGrid], is_exact: bool = False) -> GridExplanation:
        """The cost of a plan, from the grid of each block."""
        terms = self.terms(grids)
        batch = self.batch_terms or (None,) * len(terms)
        paper = self.paper_terms or {}
        layers = tuple(
            LayerExplanation(
                grid=grid,
                kind=block.head.kind,
                followers=block.follower_names,
                terms=own,
                batch=other,
                paper=paper.get(block.name),
                is_whole=block.kind == "whole",
            )
            for block, grid, own, other in zip(self.graph.blocks, grids, terms, batch, strict=True)
        )
        total = sum(terms, start=GridTerms())
        return GridExplanation(
            layers,
            total,
            hidden_seconds(total, self.settings.overlap),
            self._seconds(self.batch_terms),
            self._seconds(tuple(paper.values()) or None),
            is_exact,
        )

    def _seconds(self, terms: tuple[GridTerms, ...] | None) -> float | None:
        if terms is None:
            return None
        return judged_seconds(sum(terms, start=GridTerms()), self.settings.overlap)


def followed(source: LayerGrid, block: Block) -> LayerGrid:
    """How a block without weights lies that lies as another does; sums lie on the batch."""
    grid = LayerGrid(block.name, source.batch * source.inputs, source.space, source.outputs)
    return _fitted(grid, block)


def _fitted(grid: LayerGrid, block: Block) -> LayerGrid:
    """The same with a part for each dimension of space that the block's head has."""
    dims = len(block.head.space)
    return replace(grid, space=(*grid.space, *(1,) * dims)[:dims])
