"""The paper's own forms and closed forms (1712.04432, sections 2 and 3), to compare ours with.

Convolutions split the batch, or, past one sample a worker, also one dimension of space. The other
layers share one 1.5D grid of Pr x Pc: rows of the weights over Pr, samples over Pc; outputs are
gathered at once. Moves between unlike grids, norms, poolings' borders and biases are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log2
from typing import NamedTuple

from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.core.windows import AxisWindow, Resize
from elbowroom.planning.grid.settings import GridLink
from elbowroom.planning.grid.strategies import divisors
from elbowroom.plans.grid import LayerGrid


class PaperTerms(NamedTuple):
    """Seconds of one layer's communication in an iteration.

    ``gather``: of its outputs over Pr; ``inputs``: sums of its inputs' gradients over Pr;
    ``weights``: sums of its weights' gradients; ``halo``: rows from a neighbour, both directions.
    """

    gather: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    halo: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self)


class PaperPlan(NamedTuple):
    """A grid for each layer with weights, and what it costs."""

    layers: tuple[LayerGrid, ...]
    terms: tuple[PaperTerms, ...]

    @property
    def by_name(self) -> dict[str, LayerGrid]:
        return {grid.name: grid for grid in self.layers}

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.terms)


class PaperForms:
    """The plans that the paper has for a model, whose shapes are those of the whole minibatch."""

    def __init__(self, shapes: ModelShapes, procs: int, link: GridLink) -> None:
        self._shapes, self._procs, self._link = shapes, procs, link

    def batch(self) -> PaperPlan | None:
        """Every layer by batch; None where there are fewer samples than workers."""
        return self._plan(1, 1) if self._procs <= self._shapes.batch else None

    def best(self) -> PaperPlan | None:
        """The best over the linear layers' grids; None where rows, or samples, do not go round."""
        areas = [
            area for area in divisors(self._procs) if self._procs // area <= self._shapes.batch
        ]
        convolutions = [layer for layer in self._shapes.weighted if _is_convolution(layer)]
        if any(min(layer.space_sizes[:1]) < areas[0] for layer in convolutions):
            return None
        plans = [self._plan(areas[0], rows) for rows in areas if self._has_rows(rows)]
        return min(plans, key=lambda plan: plan.seconds, default=None)

    def _has_rows(self, rows: int) -> bool:
        others = (each for each in self._shapes.weighted if not _is_convolution(each))
        return all(
            rows <= (layer.groups if layer.kind == "attention" else layer.num_features)
            for layer in others
        )

    def _plan(self, area: int, rows: int) -> PaperPlan:
        """Convolutions in ``area`` parts of space, other layers in ``rows`` parts of weights."""
        found = [
            self._domain(layer, area) if _is_convolution(layer) else self._rows(layer, rows)
            for layer in self._shapes.weighted
        ]
        grids, terms = zip(*found, strict=True)
        return PaperPlan(grids, terms)

    def _domain(self, layer: LayerShape, area: int) -> tuple[LayerGrid, PaperTerms]:
        samples = self._procs // area
        space = (area, *(1 for _ in layer.space[1:]))
        halo = 0.0
        if area > 1:
            source = self._source(layer)
            halo = self._message(_border(source, layer.windows[0]) / samples)
            if not self._is_first(layer):
                halo += self._message(_border(layer, layer.windows[0]) / samples)
        terms = PaperTerms(weights=self._sum(self._procs, self._bytes(layer.weights)), halo=halo)
        return LayerGrid(layer.name, samples, space), terms

    def _rows(self, layer: LayerShape, rows: int) -> tuple[LayerGrid, PaperTerms]:
        samples, source = self._procs // rows, self._source(layer)
        made = self._bytes(layer.num_elements / samples)
        read = self._bytes(source.num_elements / samples)
        terms = PaperTerms(
            gather=self._gather(rows, made),
            inputs=0.0 if self._is_first(layer) else 2 * self._gather(rows, read),
            weights=self._sum(samples, self._bytes(layer.weights / rows)),
        )
        space = tuple(1 for _ in layer.space)
        return LayerGrid(layer.name, samples, space, outputs=rows), terms

    def _source(self, layer: LayerShape) -> LayerShape:
        """What a layer reads; itself for one that looks up constants."""
        return self._shapes.by_name[layer.sources[0]] if layer.sources else layer

    def _is_first(self, layer: LayerShape) -> bool:
        """Whether nothing reads the gradient of what it reads."""
        return not layer.sources or self._source(layer).kind == "input"

    def _bytes(self, elements: float) -> float:
        return elements * self._shapes.element_bytes

    def _message(self, elements: float) -> float:
        return self._link.latency_seconds + self._bytes(elements) / self._link.bandwidth

    def _gather(self, count: int, num_bytes: float) -> float:
        latency = self._link.latency_seconds * ceil(log2(count))
        return latency + num_bytes / self._link.bandwidth * (count - 1) / count

    def _sum(self, count: int, num_bytes: float) -> float:
        return 2 * self._gather(count, num_bytes)


def crossovers(shapes: ModelShapes) -> Iterator[tuple[str, float]]:
    """For each layer with weights the batch below which rows of weights move less than a batch's
    gradients: 2 |W| / (d_i + 2 d_{i-1}), where nothing reads the first layer's d_{i-1}.
    """
    for layer in shapes.weighted:
        sources = [shapes.by_name[name] for name in layer.sources[:1]]
        read = sum(each.num_elements for each in sources if each.kind != "input")
        yield layer.name, 2 * layer.weights * shapes.batch / (layer.num_elements + 2 * read)


def _is_convolution(layer: LayerShape) -> bool:
    return layer.kind in ("conv", "conv_transpose")


def _border(layer: LayerShape, window: AxisWindow) -> float:
    """Elements of the rows that half a window reaches over a border of the first dimension."""
    assert not isinstance(window, Resize)
    return layer.num_elements / layer.space_sizes[0] * (window.kernel // 2)
