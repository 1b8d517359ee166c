"""Why a grid is what it is: the terms of each layer's cost, beside those of simpler grids."""

from __future__ import annotations

from dataclasses import dataclass, fields

from elbowroom.plans.grid import LayerGrid


@dataclass(frozen=True)
class GridTerms:
    """Seconds of an iteration and bytes, for the worker that has the most to do.

    Args:
        halo: border rows of windows, forward and backward.
        weights: sums of the weights' gradients over the workers that have other samples or rows.
        norms: sums of statistics, and of a global pooling.
        moves: from a layer's layout to its readers', forward and backward; pending sums included.
        forward: products of the forward; 0 where neither seconds nor a rate are known.
        backward: products of the backward.
        memory_bytes: weights, gradients, momentum and activations.

    """

    halo: float = 0.0
    weights: float = 0.0
    norms: float = 0.0
    moves: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    memory_bytes: float = 0.0

    @property
    def compute(self) -> float:
        return self.forward + self.backward

    @property
    def communication(self) -> float:
        return self.halo + self.weights + self.norms + self.moves

    def __add__(self, other: GridTerms) -> GridTerms:
        names = [field.name for field in fields(self)]
        return GridTerms(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class LayerExplanation:
    """One layer that has a layout of its own: one with weights, a join, a fork, or a whole one.

    Args:
        grid: how it is split; its name is the layer's.
        kind: of the layer, as in ``core/layer_shapes.py``.
        followers: names of the layers that run in its layout.
        terms: what it costs; moves are those to its readers.
        batch: the same of a plan that splits the batch alone; None where it has too few samples.
        paper: the same of the best plan in the paper's forms, by the paper's closed forms; None
            where there is none, and for layers without weights, which they do not price.
        is_whole: whether every worker gathers all it reads and computes all of it, for want of a
            rule that splits it.

    """

    grid: LayerGrid
    kind: str
    followers: tuple[str, ...]
    terms: GridTerms
    batch: GridTerms | None = None
    paper: GridTerms | None = None
    is_whole: bool = False


@dataclass(frozen=True)
class GridExplanation:
    """A plan's cost, layer by layer.

    Args:
        layers: in the order in which they run.
        total: sum over the layers.
        hidden_seconds: of sums of weights behind the backward.
        batch_seconds: an iteration, with the same overlap, of the plan that splits the batch alone;
            None where there are fewer samples than workers.
        paper_seconds: the same of the paper's best form; None where it has none.
        is_exact: whether the plan is the best of all for these terms without overlap and limit: the
            graph was reduced without fixing the layout of a join, and no strategies were left out.

    """

    layers: tuple[LayerExplanation, ...]
    total: GridTerms
    hidden_seconds: float = 0.0
    batch_seconds: float | None = None
    paper_seconds: float | None = None
    is_exact: bool = True

    @property
    def seconds(self) -> float:
        """An iteration: products, communication, less what is hidden behind the backward."""
        return self.total.compute + self.total.communication - self.hidden_seconds

    @property
    def whole(self) -> tuple[str, ...]:
        """Names of the layers that no rule splits: every worker computes all of them."""
        return tuple(layer.grid.name for layer in self.layers if layer.is_whole)
