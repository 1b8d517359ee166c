"""What it costs to bring a tensor from one block's layout to another's, forward and backward.

Digits of the workers' numbers keep their dimension where the next layout has it too, so intervals
nest, and a worker receives just what its part of the new layout lacks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.planning.grid.blocks import Block
from elbowroom.planning.grid.costs import doublings, gather_seconds
from elbowroom.planning.grid.settings import GridLink
from elbowroom.planning.grid.strategies import Floats, Strategies


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
    area = np.ones_like(ways.space) if is_pooled else ways.space
    return _spread(ways, area, ways.outputs, pending)


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
    """Seconds of moving ``layer``'s output, and its gradient back: [made, read]."""
    if made.parts.shape[1] != read.parts.shape[1]:
        made, read = made.without_space(), read.without_space()
    num_bytes = layer.num_elements * element_bytes
    forward = move_seconds(link, procs, num_bytes, made, read)
    backward = move_seconds(link, procs, num_bytes, read, made)
    return forward + backward.T


def move_seconds(
    link: GridLink, procs: int, num_bytes: float, source: Spread, target: Spread
) -> Floats:
    """Seconds from one layout, with its summands, to another, whole on all replicas.

    First each element's summands go to one of the workers that have them, where the target is finer
    and else on the batch; then each worker gets what its part of the target lacks.
    """
    pending = source.pending[:, None]
    scatter = np.where(
        pending > 1, gather_seconds(link, pending, num_bytes / _product(source.parts)[:, None]), 0.0
    )
    finer = _scattered(source, target)
    wanted = _product(target.parts)[None, :]
    common = np.ones_like(finer[0])
    for dim, parts in enumerate(finer):
        common = common * np.maximum(parts, target.parts[None, :, dim])
    received = num_bytes * (1 / wanted - 1 / common)
    sources = common / wanted
    gathered = np.minimum(sources, procs / wanted)
    messages = doublings(gathered) + sources / gathered - 1
    moved = link.latency_seconds * messages + received / link.bandwidth
    return np.asarray(scatter + np.where(received > 0, moved, 0.0))


def _scattered(source: Spread, target: Spread) -> list[Floats]:
    """Parts of each dimension once the summands are added: for each a matrix [source, target]."""
    left = source.pending[:, None] * np.ones((1, len(target.pending)))
    finer = []
    for dim in range(source.parts.shape[1]):
        parts = source.parts[:, dim, None]
        factor = np.clip(target.parts[None, :, dim] / parts, 1, left)
        finer.append(parts * factor)
        left = left / factor
    finer[0] = finer[0] * left
    return finer


def _product(parts: Floats) -> Floats:
    return np.asarray(parts.prod(axis=1))
