"""A traced model: its layers, what each runs, reads and hands on, and whose weights it has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from elbowroom.core.layer_graph import Edge
from elbowroom.pipeline.tracing import ModelGraph
from elbowroom.pipeline.values import Value


@dataclass(frozen=True, eq=False)
class TracedLayer:
    """One layer.

    Args:
        name: of the module as the model names it, or of the graph's node.
        node: that gives its output; None for ``output``.
        nodes: that run for it, ``node`` among them, in order.
        sources: names of the layers whose output it reads, in order.
        value: its output; None for ``output``.
        overwrites: names of the layers into whose output it writes.
        parameters: names of the parameters it uses, tied ones by one name.
        state: names of what it changes in training: those with a gradient, and running statistics.

    """

    name: str
    description: str
    node: fx.Node | None
    nodes: tuple[fx.Node, ...]
    sources: tuple[str, ...]
    value: Value | None
    overwrites: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    state: tuple[str, ...] = ()

    @property
    def is_input(self) -> bool:
        return self.node is not None and self.node.op == "placeholder"


class Tied(NamedTuple):
    """A parameter, or running statistics, of several layers."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model and its layers, each after those that it reads.

    ``training`` is the mode in which it was traced; ``results`` are the layers whose outputs the
    model returns; ``output_nodes`` run for what it returns.
    """

    model: nn.Module
    graph: ModelGraph
    layers: tuple[TracedLayer, ...]
    results: tuple[str, ...]
    output_nodes: tuple[fx.Node, ...]
    training: bool

    @cached_property
    def by_name(self) -> dict[str, TracedLayer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def places(self) -> dict[fx.Node, int]:
        """Of the graph's nodes, in the order in which they run."""
        return {node: place for place, node in enumerate(self.graph.module.graph.nodes)}

    @property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(Edge(s, layer.name) for layer in self.layers for s in layer.sources)

    @property
    def tied(self) -> tuple[Tied, ...]:
        """State that several layers share."""
        users: dict[str, list[str]] = {}
        for layer in self.layers:
            for name in layer.state:
                users.setdefault(name, []).append(layer.name)
        return tuple(Tied(name, tuple(who)) for name, who in users.items() if len(who) > 1)

    def named_inputs(self, inputs: Any) -> dict[str, torch.Tensor]:
        """The tensors of a batch, by the names that stages load them by."""
        values = self.graph.placeholder_values(inputs)
        nodes = [node for node in self.places if node.op == "placeholder"]
        given = dict(zip(nodes, values, strict=True))
        named: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            if layer.is_input:
                assert layer.node is not None and layer.value is not None
                tensors = layer.value.flatten(given[layer.node])
                named.update(zip(layer.value.names, tensors, strict=True))
        return named
