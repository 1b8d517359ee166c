"""Blocks of a model: a layer that has a layout of its own, with the layers that run in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from elbowroom.core.layer_shapes import LayerShape, ModelShapes

BlockKind = Literal["weighted", "plain", "whole"]
"""``plain``: a join or a fork, whose output lies in a layout that no weights suggest."""


class Follower(NamedTuple):
    """A layer that runs in its block's layout, and what it reads there."""

    layer: LayerShape
    source: LayerShape


@dataclass(frozen=True)
class Block:
    """A layer that has a layout of its own, with the layers that run in it.

    Args:
        head: the layer. Of a fork it is the layer that several read, which the block before runs.
        kind: what suggests its layout.
        source: what the head reads first; None for one that reads the model's input alone.
        followers: layers without weights behind the head, up to the next block.
        is_first: whether it reads the model's input alone: nothing is sent back from it.
        is_fork: whether the head runs in the block before.

    """

    head: LayerShape
    kind: BlockKind
    source: LayerShape
    followers: tuple[Follower, ...] = ()
    is_first: bool = False
    is_fork: bool = False

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def is_convolution(self) -> bool:
        return self.head.kind in ("conv", "conv_transpose")

    @property
    def num_inputs(self) -> int:
        """Features of what it reads."""
        return self.source.num_features


class Edge(NamedTuple):
    """What one block's layers hand to another's: the output of ``layer``.

    ``is_pooled``: its space was summed up in the source's block, so it is whole in space.
    """

    source: int
    target: int
    layer: LayerShape
    is_pooled: bool


class BlockGraph(NamedTuple):
    """Blocks in the order in which they run, and what moves between them."""

    blocks: tuple[Block, ...]
    edges: tuple[Edge, ...]

    @property
    def is_chain(self) -> bool:
        """Whether each block reads one other at most, and is read by one."""
        sources = {edge.source for edge in self.edges}
        targets = {edge.target for edge in self.edges}
        return len(sources) == len(targets) == len(self.edges)

    def main_source(self, block: int) -> int | None:
        """The block of what a block reads first."""
        return next((edge.source for edge in self.edges if edge.target == block), None)


def block_graph(shapes: ModelShapes) -> BlockGraph:
    """The blocks of a model.

    A weighted layer, a layer without a rule and a join (several sources from unlike blocks) begin
    one. So does the output of a layer behind a weighted one that several read: it is brought to one
    layout, which all of them find. What depends on the model's input alone has no block: each
    worker makes what it needs.
    """
    return _Builder(shapes).built()


class _Place(NamedTuple):
    """Where the output of a layer lies: in the layout of a block, or with space summed up."""

    block: int
    is_pooled: bool


class _Builder:
    def __init__(self, shapes: ModelShapes) -> None:
        self._shapes = shapes
        self._places: dict[str, _Place] = {}
        """Of the layers that do not depend on the model's input alone."""
        self._heads: list[Block] = []
        self._followers: list[list[Follower]] = []
        self._edges: list[Edge] = []

    def built(self) -> BlockGraph:
        for layer in self._shapes.layers:
            self._add(layer)
        blocks = (
            Block(head.head, head.kind, head.source, tuple(behind), head.is_first, head.is_fork)
            for head, behind in zip(self._heads, self._followers, strict=True)
        )
        return BlockGraph(tuple(blocks), tuple(self._edges))

    def _add(self, layer: LayerShape) -> None:
        places = {self._places[name] for name in layer.sources if name in self._places}
        if layer.is_weighted:
            self._begin(layer, "weighted")
        elif layer.kind == "whole" and layer.sources:
            self._begin(layer, "whole")
        elif len(places) > 1:
            self._begin(layer, "plain")
        elif places:
            self._follow(layer, *places)
        if self._is_fork(layer):
            self._begin(layer, "plain", is_fork=True)

    def _is_fork(self, layer: LayerShape) -> bool:
        if layer.is_weighted or layer.name not in self._places:
            return False
        home = self._heads[self._places[layer.name].block]
        return home.kind == "weighted" and len(self._shapes.readers[layer.name]) > 1

    def _begin(self, layer: LayerShape, kind: BlockKind, is_fork: bool = False) -> None:
        index = len(self._heads)
        read = [layer.name] if is_fork else list(dict.fromkeys(layer.sources))
        edges = list(self._edges_to(index, read))
        source = self._shapes.by_name[read[0]] if read else layer
        self._heads.append(Block(layer, kind, source, is_first=not edges, is_fork=is_fork))
        self._followers.append([])
        self._edges += edges
        self._places[layer.name] = _Place(index, False)

    def _edges_to(self, target: int, read: list[str]) -> Iterator[Edge]:
        for name in read:
            if name in self._places:
                block, is_pooled = self._places[name]
                yield Edge(block, target, self._shapes.by_name[name], is_pooled)

    def _follow(self, layer: LayerShape, place: _Place) -> None:
        source = next(name for name in layer.sources if name in self._places)
        follower = Follower(layer, self._shapes.by_name[source])
        self._followers[place.block].append(follower)
        is_pooled = place.is_pooled or layer.kind == "global_pool"
        self._places[layer.name] = _Place(place.block, is_pooled)
