"""What a block costs whatever its neighbours do, for each way to split it.

Times are for the worker that has the most to do. A message costs a latency, and its bytes over the
bandwidth; a sum over g workers goes round twice, ceil(log2 g) latencies each time (1712.04432, 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.planning.grid.blocks import Block, Follower
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.halo import border
from elbowroom.planning.grid.settings import GridLink, GridSettings
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

    def terms(self, row: int, moves: float = 0.0) -> GridTerms:
        values = {name: float(getattr(self, name)[row]) for name in self._fields}
        return GridTerms(**values, moves=moves)


def doublings(count: Floats) -> Floats:
    """Rounds in which ``count`` workers reach each other."""
    return np.asarray(np.ceil(np.log2(np.maximum(count, 1))))


def gather_seconds(link: GridLink, count: Floats, num_bytes: Floats) -> Floats:
    """Each of ``count`` workers gets the whole, ``num_bytes``, of which it has its part."""
    latency = link.latency_seconds * doublings(count)
    return latency + num_bytes / link.bandwidth * (count - 1) / count


def sum_seconds(link: GridLink, count: Floats, num_bytes: Floats) -> Floats:
    """Each of ``count`` workers gets the sum of ``num_bytes`` of each: an all-reduce."""
    return np.where(count > 1, 2 * gather_seconds(link, count, num_bytes), 0.0)


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
        )

    def _halo(self) -> Floats:
        """Border rows of the head's windows and of its followers', both directions."""
        block, ways = self._block, self._strategies
        total = self._nothing()
        if not block.is_fork and block.head.windows:
            directions = 1 if block.is_first else 2
            total += directions * self._borders(block.head, block.source, ways.inputs)
        for layer, source in block.followers:
            if layer.windows:
                total += 2 * self._borders(layer, source, ways.outputs)
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
        ways = self._strategies
        num_bytes = self._weight_bytes()
        seconds = sum_seconds(self._settings.link, ways.batch * ways.area, num_bytes)
        return np.where(num_bytes > 0, seconds, 0.0)

    def _weight_bytes(self) -> Floats:
        """Of one worker's weights."""
        head, ways = self._block.head, self._strategies
        if self._block.is_fork:
            return self._nothing()
        held = head.weights + head.biases
        return held * self._element_bytes / (ways.outputs * ways.inputs)

    def _norms(self) -> Floats:
        return sum((self._norm(each) for each in self._block.followers), self._nothing())

    def _norm(self, follower: Follower) -> Floats:
        """Sums of a norm's statistics, forward and backward, or of a global pooling, forward."""
        layer, _ = follower
        ways, link = self._strategies, self._settings.link
        if layer.kind == "batch_norm":
            num_bytes = STATISTICS * layer.num_features / ways.outputs * self._element_bytes
            return 2 * sum_seconds(link, ways.batch * ways.area, num_bytes)
        if layer.kind == "group_norm":
            groups = layer.shape[0] / ways.batch * np.ceil(layer.groups / ways.outputs)
            count = ways.area * np.where(ways.outputs > layer.groups, ways.outputs, 1)
            return 2 * sum_seconds(link, count, STATISTICS * groups * self._element_bytes)
        if layer.kind == "layer_norm":
            rows = layer.num_elements / layer.num_features / ways.batch / ways.area
            return 2 * sum_seconds(link, ways.outputs, STATISTICS * rows * self._element_bytes)
        if layer.kind == "global_pool":
            sums = layer.shape[0] * layer.num_features / ways.batch / ways.outputs
            return sum_seconds(link, ways.area, sums * self._element_bytes)
        return self._nothing()

    def _products(self, seconds_of: Callable[[LayerShape], float]) -> Floats:
        """Seconds of a direction: of the head, split by all its parts, and of what follows it."""
        head, ways = self._block.head, self._strategies
        total = self._nothing()
        if not self._block.is_fork:
            total += seconds_of(head) * self._share(self._input_share())
        for layer, _ in self._block.followers:
            spread = 1 / ways.inputs if self._block.kind == "weighted" else 1.0
            total += seconds_of(layer) * self._share(spread)
        return total

    def _input_share(self) -> Floats | float:
        if self._block.kind != "weighted":
            return 1.0
        count = self._block.num_inputs
        return _most(count, self._strategies.inputs)

    def _share(self, inputs: Floats | float) -> Floats:
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
        if block.kind != "weighted":
            return self._nothing()
        held = HELD_PER_WEIGHT * self._weight_bytes()
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
    return (block.kind, block.is_first, block.is_fork, *(_facts(layer) for layer in layers))


def _facts(layer: LayerShape) -> tuple[object, ...]:
    return tuple(value for name, value in vars(layer).items() if name not in ("name", "sources"))
