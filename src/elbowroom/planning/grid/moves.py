"""What it costs to bring a tensor from one block's layout to another's, forward and backward.

Digits of the workers' numbers keep their dimension where the next layout has it too, so intervals
nest, and a worker receives just what its part of the new layout lacks.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import numpy as np

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.planning.grid.blocks import Block
from elbowroom.planning.grid.link import doublings, gather_seconds
from elbowroom.planning.grid.settings import GridLink
from elbowroom.planning.grid.strategies import Floats, Strategies

Parts = list[Floats]
"""Parts of each dimension: batch, space, features; each array [sources, targets]."""


class Spread(NamedTuple):
    """How a tensor lies for each of several strategies: parts of its dimensions, and summands.

    ``parts`` is [strategies, dimensions], batch first, then space, then features; ``pending`` is
    over how many workers each element's summands are spread; the rest hold replicas.
    """

    parts: Floats
    pending: Floats

    def without_space(self) -> Spread:
        """The same with all dimensions of space as one."""
        area = self.parts[:, 1:-1].prod(axis=1, keepdims=True)
        return self._replace(parts=np.hstack([self.parts[:, :1], area, self.parts[:, -1:]]))


def made(block: Block, ways: Strategies, is_pooled: bool = False) -> Spread:
    """How a block's output lies before its summands are added."""
    one = np.ones(ways.count)
    if block.head.kind == "attention" and block.kind == "weighted":
        return _spread(ways, one, one, ways.outputs)
    pending = ways.inputs if block.kind == "weighted" else one
    if is_pooled:
        return _spread(ways, np.ones_like(ways.space), ways.outputs, pending * ways.area)
    return _spread(ways, ways.space, ways.outputs, pending)


def read(block: Block, ways: Strategies) -> Spread:
    """How a block's input must lie; ``pending`` is that of its gradient."""
    one = np.ones(ways.count)
    if block.kind != "weighted":
        return _spread(ways, ways.space, ways.outputs, one)
    if block.head.kind == "attention":
        return _spread(ways, one, one, ways.outputs)
    return _spread(ways, ways.space, ways.inputs, ways.outputs)


def _spread(ways: Strategies, space: Floats, features: Floats, pending: Floats) -> Spread:
    space = space.reshape(ways.count, -1)
    return Spread(np.hstack([ways.batch[:, None], space, features[:, None]]), pending)


def both_ways_seconds(
    link: GridLink, procs: int, layer: LayerShape, element_bytes: int, made: Spread, read: Spread
) -> Floats:
    """Seconds of moving ``layer``'s output, and its gradient back: [made, read].

    The output's own summands have been added, and lie where the reader is finer, else on the batch;
    those of its gradient are added on the way back.
    """
    if made.parts.shape[1] != read.parts.shape[1]:
        made, read = made.without_space(), read.without_space()
    num_bytes = layer.num_elements * element_bytes
    source, target = _rows(made), _columns(read)
    settled = _scattered(source, made.pending[:, None], target)
    forward = move_seconds(link, procs, num_bytes, settled, target)
    summands = read.pending[None, :]
    scatter = gather_seconds(link, summands, num_bytes / _product(target))
    gradient = _scattered(target, summands, settled)
    backward = move_seconds(link, procs, num_bytes, gradient, settled)
    return np.asarray(forward + np.where(summands > 1, scatter, 0.0) + backward)


def move_seconds(
    link: GridLink, procs: int, num_bytes: float, source: Parts, target: Parts
) -> Floats:
    """Seconds in which each worker gets what its part of the target lacks of the source's."""
    common = _product([np.maximum(one, other) for one, other in zip(source, target, strict=True)])
    wanted = _product(target)
    received = num_bytes * (1 / wanted - 1 / common)
    sources = common / wanted
    gathered = np.minimum(sources, procs / wanted)
    messages = doublings(gathered) + sources / gathered - 1
    moved = link.latency_seconds * messages + received / link.bandwidth
    return np.where(common > wanted, moved, 0.0)


def _scattered(source: Parts, pending: Floats, wish: Parts) -> Parts:
    """Parts once each element's summands went to one of the workers that have them.

    They go where ``wish`` is finer, and else on the batch.
    """
    left, finer = pending, []
    for parts, wished in zip(source, wish, strict=True):
        factor = np.clip(wished / parts, 1, left)
        finer.append(parts * factor)
        left = left / factor
    return [finer[0] * left, *finer[1:]]


def _rows(spread: Spread) -> Parts:
    return [spread.parts[:, dim, None] for dim in range(spread.parts.shape[1])]


def _columns(spread: Spread) -> Parts:
    return [spread.parts[None, :, dim] for dim in range(spread.parts.shape[1])]


def _product(parts: Parts) -> Floats:
    return reduce(np.multiply, parts)
