"""What a block costs whatever its neighbours do, for each way to split it.

Times are for the worker that has the most to do. A message costs a latency, and its bytes over the
bandwidth (``link.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.planning.grid.blocks import Block
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.halo import border
from elbowroom.planning.grid.link import gather_seconds, sum_seconds
from elbowroom.planning.grid.moves import made
from elbowroom.planning.grid.settings import GridSettings
from elbowroom.planning.grid.strategies import Floats, Strategies

HELD_PER_WEIGHT = 3
"""A weight, its gradient, and its momentum."""
STATISTICS = 2
"""Numbers that a norm sums for each channel: a sum and a sum of squares, and as many backward."""


class BlockCosts(NamedTuple):
    """Terms of a block, as in ``GridTerms``, each [strategies]."""

    halo: Floats
    weights: Floats
    norms: Floats
    forward: Floats
    backward: Floats
    memory_bytes: Floats
    sums: Floats
    """Of adding summands over the parts of the inputs, which ``GridTerms`` counts as a move."""

    @property
    def rest(self) -> Floats:
        """Seconds that are neither sums of weights nor the backward's products."""
        return self.halo + self.norms + self.sums + self.forward

    def terms(self, row: int, moves: float = 0.0) -> GridTerms:
        values = {name: float(getattr(self, name)[row]) for name in self._fields}
        return GridTerms(moves=moves + values.pop("sums"), **values)


class BlockPricing:
    """Prices of one block, for all its strategies at once."""

    def __init__(
        self, block: Block, strategies: Strategies, settings: GridSettings, element_bytes: int
    ) -> None:
        self._block = block
        self._strategies = strategies
        self._settings = settings
        self._element_bytes = element_bytes

    def costs(self) -> BlockCosts:
        return BlockCosts(
            halo=self._halo(),
            weights=self._weights(),
            norms=self._norms(),
            forward=self._products(self._forward),
            backward=self._products(self._backward),
            memory_bytes=self._memory(),
            sums=self._sums(),
        )

    def _sums(self) -> Floats:
        """Forward, each element's summands go to one of the workers that have them, before what
        follows runs; backward, all of these get its gradient. A loss needs all features of a row.
        """
        block, link, ways = self._block, self._settings.link, self._strategies
        total = self._nothing()
        if block.kind == "weighted":
            parts, pending = made(block, ways)
            num_bytes = block.head.num_elements * self._element_bytes / parts.prod(axis=1)
            total += 2 * gather_seconds(link, pending, num_bytes)
        for layer, _ in block.followers:
            if layer.kind == "global_pool":
                num_bytes = layer.num_elements * self._element_bytes / ways.batch / ways.outputs
                total += 2 * gather_seconds(link, ways.area, num_bytes / self._spread)
        for layer in block.results:
            parts = ways.batch * ways.area * self._spread
            num_bytes = layer.num_elements * self._element_bytes / parts
            total += gather_seconds(link, ways.outputs, num_bytes)
        return total

    def _halo(self) -> Floats:
        """Border rows of the head's windows and of its followers', both directions."""
        block, ways = self._block, self._strategies
        total = self._nothing()
        if block.kind == "weighted":
            directions = 1 if block.is_first else 2
            total += directions * self._borders(block.head, block.source, ways.inputs)
        for layer, source in block.followers:
            total += 2 * self._borders(layer, source, ways.outputs * self._spread)
        return total

    def _borders(self, layer: LayerShape, source: LayerShape, features: Floats) -> Floats:
        """Seconds of fetching border rows of ``source``, whose channels are split ``features``."""
        link, ways, sizes = self._settings.link, self._strategies, source.space_sizes
        seconds = self._nothing()
        for dim, window in enumerate(layer.windows):
            others = [other for other in range(len(sizes)) if other != dim]
            row_elements = source.num_elements / sizes[dim] / ways.batch / features
            row_elements = row_elements / ways.space[:, others].prod(axis=1)
            found = [border(window, sizes[dim], int(parts)) for parts in ways.space[:, dim]]
            rows, messages = np.array(found, float).reshape(-1, 2).T
            seconds += link.latency_seconds * messages
            seconds += rows * row_elements * self._element_bytes / link.bandwidth
        return seconds

    def _weights(self) -> Floats:
        """The sum of weights' gradients over the workers that have other samples or rows."""
        ways, num_bytes = self._strategies, self._weight_bytes()
        seconds = sum_seconds(self._settings.link, ways.batch * ways.area, num_bytes)
        return np.where(num_bytes > 0, seconds, 0.0)

    def _weight_bytes(self) -> Floats:
        """Of one worker's weights; a bias is split as the outputs are, a norm's scale is whole."""
        head, ways = self._block.head, self._strategies
        total = self._nothing()
        if self._block.kind != "plain":
            total += head.weights / (ways.outputs * ways.inputs) + head.biases / ways.outputs
        for layer, _ in self._block.followers:
            total += layer.weights + layer.biases
        return total * self._element_bytes

    @property
    def _spread(self) -> Floats:
        """Parts into which sums over the inputs are scattered, on which followers run."""
        is_weighted = self._block.kind == "weighted"
        return self._strategies.inputs if is_weighted else np.ones(self._strategies.count)

    def _norms(self) -> Floats:
        return sum((self._norm(each.layer) for each in self._block.followers), self._nothing())

    def _norm(self, layer: LayerShape) -> Floats:
        """Sums of a norm's statistics, forward and backward."""
        ways, link = self._strategies, self._settings.link
        if layer.kind == "batch_norm":
            num_bytes = STATISTICS * layer.num_features / ways.outputs * self._element_bytes
            return 2 * sum_seconds(link, ways.batch * ways.area * self._spread, num_bytes)
        if layer.kind == "group_norm":
            groups = layer.shape[0] * layer.groups / (ways.batch * ways.outputs * self._spread)
            return 2 * sum_seconds(link, ways.area, STATISTICS * groups * self._element_bytes)
        return self._nothing()

    def _products(self, seconds_of: Callable[[LayerShape], float]) -> Floats:
        """Seconds of a direction: of the head, split by all its parts, and of what follows it."""
        block, total = self._block, self._nothing()
        if block.kind == "weighted":
            total += seconds_of(block.head) * self._share(self._input_share())
        elif block.kind == "whole":
            total += seconds_of(block.head)
        for layer, _ in block.followers:
            total += seconds_of(layer) * self._share(1 / self._spread)
        return total

    def _input_share(self) -> Floats:
        if self._block.head.kind in ("attention", "embedding"):
            return np.ones(self._strategies.count)
        return _most(self._block.num_inputs, self._strategies.inputs)

    def _share(self, inputs: Floats) -> Floats:
        """The part of the head's products that the worker with most of them has."""
        head, ways = self._block.head, self._strategies
        features = head.groups if "attention" in head.kind else head.num_features
        share = _most(self._settings.batch, ways.batch) * _most(features, ways.outputs) * inputs
        for dim, size in enumerate(head.space_sizes):
            share = share * _most(size, ways.space[:, dim])
        return np.asarray(share)

    def _forward(self, layer: LayerShape) -> float:
        return layer.forward_seconds or self._rated(layer.flops)

    def _backward(self, layer: LayerShape) -> float:
        """The gradients of weights and of what is read; nothing reads the input's."""
        products = 1 if self._block.is_first and layer is self._block.head else 2
        return layer.backward_seconds or self._rated(products * layer.flops)

    def _rated(self, flops: float) -> float:
        rate = self._settings.flops_per_second
        return flops / rate if rate else 0.0

    def _memory(self) -> Floats:
        """Weights, gradients and momentum, and what a weighted layer reads and makes."""
        block, ways = self._block, self._strategies
        held = HELD_PER_WEIGHT * self._weight_bytes()
        if block.kind != "weighted":
            return held
        samples_and_rows = ways.batch * ways.area
        read = block.source.num_elements / (samples_and_rows * ways.inputs)
        made = block.head.num_elements / (samples_and_rows * ways.outputs)
        return held + (read + made) * self._element_bytes

    def _nothing(self) -> Floats:
        return np.zeros(self._strategies.count)


def _most(count: int, parts: Floats) -> Floats:
    """The largest of ``parts`` even parts of ``count``, as a share of the whole."""
    return np.asarray(np.ceil(count / parts) / count)


def facts_of(block: Block) -> tuple[object, ...]:
    """All that a block's cost depends on, so that blocks alike are priced once."""
    layers = [block.head, block.source]
    for each in block.followers:
        layers += each
    layers += block.results
    return (block.kind, block.is_first, len(block.results), *(_facts(layer) for layer in layers))


def _facts(layer: LayerShape) -> tuple[object, ...]:
    return tuple(value for name, value in vars(layer).items() if name not in ("name", "sources"))
