"""A traced model: its layers, what each runs, reads and passes on, and the weights they use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import Edge
from elbowroom.training.tracing import ModelGraph
from elbowroom.training.values import TensorFacts, Value


@dataclass(frozen=True, eq=False)
class TracedLayer:
    """One layer of a traced model.

    Args:
        name: name of the module in the model, or of the graph's node.
        description: short text for people; "Input" for an input.
        node: node that gives the output; None for ``output``.
        nodes: nodes that run for it, ``node`` among them, in order.
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
    """What several layers share, and so must have in one stage, by its name."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model and its layers, each after those that it reads.

    ``training`` is the mode in which it was traced; ``results`` are the layers whose outputs the
    model returns; ``output_nodes`` are run for what it returns. ``shared`` is memory that some
    layer writes into, with all that read it. ``stale`` are layers that write, each to one that
    reads that memory later in a tensor made before.
    """

    model: nn.Module
    graph: ModelGraph
    layers: tuple[TracedLayer, ...]
    results: tuple[str, ...]
    output_nodes: tuple[fx.Node, ...]
    training: bool
    shared: tuple[Tied, ...] = ()
    stale: tuple[Edge, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, TracedLayer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def places(self) -> dict[fx.Node, int]:
        """Position of each of the graph's nodes, in the order in which they run."""
        return {node: place for place, node in enumerate(self.graph.module.graph.nodes)}

    @property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(Edge(s, layer.name) for layer in self.layers for s in layer.sources)

    @property
    def tied(self) -> tuple[Tied, ...]:
        """What stages cannot share, with all its users.

        Parameters, running statistics, outputs that cannot be sent or are written into.
        """
        users: dict[str, list[str]] = {}
        unsent = {layer.name for layer in self.layers if layer.value and layer.value.is_unsendable}
        for layer in self.layers:
            used = (*layer.state, *(name for name in layer.sources if name in unsent))
            for name in (*used, *([layer.name] if layer.name in unsent else [])):
                users.setdefault(name, []).append(layer.name)
        tied = (Tied(name, tuple(who)) for name, who in users.items() if len(who) > 1)
        return (*self.shared, *tied)

    @cached_property
    def tensors(self) -> dict[str, TensorFacts]:
        """Tensors of all layers and inputs, by name."""
        values = [layer.value for layer in self.layers if layer.value is not None]
        return {tensor.name: tensor for value in values for tensor in value.tensors}

    def named_inputs(self, inputs: Any) -> dict[str, torch.Tensor]:
        """The tensors of a batch, by the names that stages load them by.

        Raises InputError for another shape than the traced one, where export has fixed that.
        """
        values = self.graph.placeholder_values(inputs)
        nodes = [node for node in self.places if node.op == "placeholder"]
        given = dict(zip(nodes, values, strict=True))
        named: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            if layer.is_input:
                assert layer.node is not None and layer.value is not None
                tensors = layer.value.flatten(given[layer.node])
                named.update(zip(layer.value.names, tensors, strict=True))
        for name, tensor in named.items():
            traced = self.tensors[name].shape
            if self.graph.is_exported and tensor.shape != traced:
                raise InputError(
                    f"input '{name}' has the shape {[*tensor.shape]}, and was exported with "
                    f"{[*traced]}: give all batches that shape, or trace the model with this one"
                )
        return named
