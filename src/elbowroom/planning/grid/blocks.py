"""Blocks of a model: a layer that has a layout of its own, with the layers that run in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.plans.grid_reshape import leading_dims

BlockKind = Literal["weighted", "plain", "whole"]
"""``plain``: a join, a fork or a layer norm, whose layout no weights suggest."""

_MOVED_BEHIND = ("reshape", "permute", "global_pool")
"""Kinds that run where their source lies, whatever the plan says of them; then the output moves."""


_KEEPS_ORDER = ("pointwise", "dropout", "reshape")


class Follower(NamedTuple):
    """A layer that runs in its block's layout, and what it reads there."""

    layer: LayerShape
    source: LayerShape


@dataclass(frozen=True)
class Block:
    """A layer that has a layout of its own, with the layers that run in it.

    Args:
        head: the layer.
        kind: what suggests its layout.
        source: what the head reads first.
        followers: layers without weights that run in its layout, up to the next block; a plain head
            that runs there is the first.
        is_first: whether it reads the model's input alone: nothing is sent back from it.
        results: layers of it that the model returns.
        input_unit: what parts of the input features must divide, 0 if nothing: those of channels
            that are flattened with space are parts of the channels.

    """

    head: LayerShape
    kind: BlockKind
    source: LayerShape
    followers: tuple[Follower, ...] = ()
    is_first: bool = False
    results: tuple[LayerShape, ...] = ()
    input_unit: int = 0

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def follower_names(self) -> tuple[str, ...]:
        """Names of the layers that run in its layout behind it."""
        return tuple(each.layer.name for each in self.followers if each.layer is not self.head)

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

    A weighted layer, a layer without a rule, a join (several sources from unlike blocks) and a
    layer norm, whose features stay together, begin one. So does a layer behind a weighted one that
    several read: its output is brought to one layout, which all of them find. What depends on the
    model's input alone has no block: each worker makes what it needs.
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
            replace(head, followers=tuple(behind), results=self._results(index))
            for index, (head, behind) in enumerate(zip(self._heads, self._followers, strict=True))
        )
        return BlockGraph(tuple(blocks), tuple(self._edges))

    def _results(self, block: int) -> tuple[LayerShape, ...]:
        names = dict.fromkeys(self._shapes.results)
        found = (name for name in names if name in self._places)
        return tuple(
            self._shapes.by_name[name] for name in found if self._places[name].block == block
        )

    def _add(self, layer: LayerShape) -> None:
        places = {self._places[name] for name in layer.sources if name in self._places}
        if layer.is_weighted:
            self._begin(layer, "weighted")
        elif layer.kind == "whole" and layer.sources:
            self._begin(layer, "whole")
        elif len(places) > 1 or (places and self._keeps_features(layer)):
            self._begin(layer, "plain", layer)
        elif not places:
            return
        elif not self._is_fork(layer, *places):
            self._follow(layer, *places)
        elif layer.kind in _MOVED_BEHIND:
            self._follow(layer, *places)
            self._begin(layer, "plain", reads=(layer.name,))
        else:
            self._begin(layer, "plain", layer)

    def _keeps_features(self, layer: LayerShape) -> bool:
        """Whether it needs all features of a row: it cannot follow what splits them."""
        return layer.kind in ("layer_norm", "dot_attention") or (
            layer.kind == "cat" and len(set(layer.sources)) > 1
        )

    def _is_fork(self, layer: LayerShape, place: _Place) -> bool:
        is_weighted = self._heads[place.block].kind == "weighted"
        return is_weighted and len(self._shapes.readers[layer.name]) > 1

    def _begin(
        self,
        layer: LayerShape,
        kind: BlockKind,
        follower: LayerShape | None = None,
        reads: tuple[str, ...] = (),
    ) -> None:
        index = len(self._heads)
        names = dict.fromkeys(reads or layer.sources)
        edges = list(self._edges_to(index, names))
        # What of several sources is from the model's input alone suggests nothing.
        known = [name for name in names if name in self._places] or list(names)
        source = self._shapes.by_name[known[0]] if known else layer
        unit = self._unit(source) if kind == "weighted" else 0
        self._heads.append(Block(layer, kind, source, is_first=not edges, input_unit=unit))
        self._followers.append([Follower(follower, source)] if follower else [])
        self._edges += edges
        self._places[layer.name] = _Place(index, False)

    def _unit(self, layer: LayerShape) -> int:
        """Rows of the dimension that a layer's features were reshaped from, if it was another."""
        while layer.kind in _KEEPS_ORDER and layer.sources:
            source = self._shapes.by_name[layer.sources[0]]
            if layer.kind == "reshape" and source.num_features != layer.num_features:
                pairs = leading_dims(source.shape, layer.shape)
                found = (source.shape[dim] for dim, other in pairs if other == layer.features)
                return next(found, 1)
            layer = source
        return 0

    def _edges_to(self, target: int, names: Iterable[str]) -> Iterator[Edge]:
        for name in names:
            if name in self._places:
                block, is_pooled = self._places[name]
                yield Edge(block, target, self._shapes.by_name[name], is_pooled)

    def _follow(self, layer: LayerShape, place: _Place) -> None:
        source = next(name for name in layer.sources if name in self._places)
        follower = Follower(layer, self._shapes.by_name[source])
        self._followers[place.block].append(follower)
        is_pooled = place.is_pooled or layer.kind == "global_pool"
        self._places[layer.name] = _Place(place.block, is_pooled)
