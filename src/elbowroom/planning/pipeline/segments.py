"""Segments of a layer graph between possible cuts, and what they share."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph


class Segments(NamedTuple):
    """Segments, the layers that the planner moves as one: a layer with free layers attached.

    Masks have one bit for each segment, in the graph's order: ``sources[i]`` is what segment i
    reads, ``readers[i]`` who reads it. Each mask in ``tied`` is a group of segments that share
    weights; these masks have one further bit, for the inputs.
    """

    layers: tuple[tuple[int, ...], ...]
    inputs: tuple[int, ...]
    sources: tuple[int, ...]
    readers: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    tied: tuple[int, ...]

    def keeps_tied(self, mask: int) -> bool:
        """Whether a cut with the segments of ``mask`` before it separates no tied segments."""
        inside = mask | 1 << len(self.layers) if mask else 0
        return all(inside & group in (0, group) for group in self.tied)


def find_segments(graph: LayerGraph) -> Segments:
    inputs = find_inputs(graph)
    owners = _find_owners(graph, inputs)
    kept = [i for i in graph.order if i not in inputs and owners[i] == i]
    if not kept:
        raise InputError("no layer takes time or memory: profile the model again")
    bit = {layer: 1 << position for position, layer in enumerate(kept)}
    members: dict[int, list[int]] = {layer: [] for layer in kept}
    for layer in graph.order:
        if owners[layer] in members:
            members[owners[layer]].append(layer)
    inputs_bit = 1 << len(kept)
    groups = ({owners[graph.index[name]] for name in names} for names in graph.tied)
    return Segments(
        layers=tuple(tuple(members[layer]) for layer in kept),
        inputs=tuple(i for i in graph.order if owners[i] in inputs),
        sources=tuple(sum(bit.get(s, 0) for s in graph.sources[layer]) for layer in kept),
        readers=tuple(sum(bit.get(r, 0) for r in graph.readers[layer]) for layer in kept),
        activation_bytes=tuple(graph.layers[layer].activation_bytes for layer in kept),
        tied=tuple(reduce(or_, (bit.get(one, inputs_bit) for one in group), 0) for group in groups),
    )


def find_inputs(graph: LayerGraph) -> set[int]:
    """Indices of layers that take no time in any stage, and whose outputs cross no cut."""
    inputs: set[int] = set()
    for index in graph.order:
        layer, sources = graph.layers[index], graph.sources[index]
        is_input = not sources and layer.description.startswith("Input")
        costs_nothing = layer.is_free and not layer.activation_bytes
        if is_input or (costs_nothing and inputs.issuperset(sources)):
            inputs.add(index)
    return inputs


def _find_owners(graph: LayerGraph, inputs: set[int]) -> list[int]:
    """The layer that each layer goes with: itself, unless it is free and nobody uses its output."""
    is_idle = [False] * len(graph.layers)
    for index in reversed(graph.order):
        is_read = any(not is_idle[reader] for reader in graph.readers[index])
        one_source = len(graph.sources[index]) == 1
        is_idle[index] = graph.layers[index].is_free and one_source and not is_read
    owners = list(range(len(graph.layers)))
    for index in graph.order:
        if is_idle[index] and index not in inputs:
            owners[index] = owners[graph.sources[index][0]]
    return owners
