"""Forward of a traced model on one worker's parts, layer by layer, as its placements say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.grid.call import Call, Draws
from elbowroom.grid.moves import collect, moved, spread
from elbowroom.grid.parts import Part, part_of_whole, zeros_like_computed
from elbowroom.grid.rules import RULES
from elbowroom.grid.transport import Channel
from elbowroom.grid.weights import Weights
from elbowroom.plans.grid_layout import Layout, whole
from elbowroom.plans.grid_placement import Placement
from elbowroom.training.operations.operation import Operation
from elbowroom.training.traced import TracedModel

SECTIONS = 3
"""Sections of messages of a layer: what it reads, what it exchanges itself, and sums after it."""


@dataclass(frozen=True, eq=False)
class GridModel:
    """A traced model, what its layers do, and where they lie."""

    traced: TracedModel
    operations: tuple[Operation, ...]
    shapes: ModelShapes
    placements: Mapping[str, Placement]

    @cached_property
    def last_readers(self) -> dict[str, str]:
        """For each layer the last one that reads it; results are read by nobody."""
        found = {
            source: each.shape.name for each in self.operations for source in each.shape.sources
        }
        return {name: reader for name, reader in found.items() if name not in self.traced.results}


def run_forward(
    model: GridModel,
    inputs: Sequence[Any],
    weights: Weights,
    channel: Channel,
    draws: Draws,
) -> dict[str, Any]:
    """What the result layers give on this worker: parts, or values of layers without a rule.

    ``inputs`` are the whole minibatch, a value for each of the graph's placeholders. Raises
    PeerLostError.
    """
    return _Run(model, inputs, weights, channel, draws).run()


class _Run:
    def __init__(
        self,
        model: GridModel,
        inputs: Sequence[Any],
        weights: Weights,
        channel: Channel,
        draws: Draws,
    ) -> None:
        self._model, self._weights, self._channel, self._draws = model, weights, channel, draws
        nodes = [node for node in model.traced.places if node.op == "placeholder"]
        self._given = dict(zip(nodes, inputs, strict=True))
        self._everywhere = _Everywhere(model.traced.graph.module)
        self._everyone = range(channel.num_workers)
        self._values: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        last = self._model.last_readers
        for number, operation in enumerate(self._model.operations):
            name = operation.shape.name
            self._values[name] = self._layer(operation, number)
            for source in operation.shape.sources:
                if last.get(source) == name:
                    self._values.pop(source, None)
        return {name: self._values[name] for name in self._model.traced.results}

    def _layer(self, operation: Operation, number: int) -> Any:
        shape, placement = operation.shape, self._model.placements[operation.shape.name]
        if shape.kind == "input":
            assert operation.layer.node is not None
            value = self._given[operation.layer.node]
            if not isinstance(value, torch.Tensor):
                return value
            return part_of_whole(value, placement.output, self._channel.worker)
        if shape.kind == "whole":
            return self._run_everywhere(operation, placement, number)
        self._channel.at(shape.name, SECTIONS * number)
        sources = tuple(
            self._read(name, placement.reads[index], placement.users(index))
            for index, name in enumerate(shape.sources)
        )
        call = Call(
            operation,
            placement,
            sources,
            self._shape(operation, sources),
            self._weights,
            self._channel,
            self._draws,
            number,
        )
        self._channel.at(shape.name, SECTIONS * number + 1)
        if self._channel.worker in placement.computed.workers:
            part = RULES[shape.kind](call)
        else:
            part = self._nothing(call)
        assert part.local.shape == call.local_shape, f"the part of '{shape.name}' fits its box"
        return self._summed(call, part)

    def _nothing(self, call: Call) -> Part:
        """The empty part of a worker that has not the layer; it takes part in the moves around."""
        facts = call.operation.layer.value
        assert facts is not None
        dtype = facts.tensors[0].dtype
        local = zeros_like_computed(call.local_shape, *(part.local for part in call.sources))
        parameters = (self._weights.local[name] for name in call.operation.parameters.values())
        is_trained = any(each.requires_grad for each in parameters)
        local = local.to(dtype)
        return call.output(local.requires_grad_() if is_trained else local)

    def _shape(self, operation: Operation, sources: Sequence[Part]) -> tuple[int, ...]:
        """Shape of the output; with another number of samples, in proportion to the traced one."""
        shape, known = operation.shape.shape, self._model.shapes.by_name
        for name, part in zip(operation.shape.sources, sources, strict=True):
            traced = known[name].shape
            if traced != part.shape:
                return (shape[0] * part.shape[0] // traced[0], *shape[1:])
        return shape

    def _summed(self, call: Call, part: Part) -> Part:
        """The output when sums have been taken, and with its bias if it waited for that."""
        placement, shape = call.placement, call.operation.shape
        self._channel.at(shape.name, SECTIONS * call.number + 2)
        part = collect(part, placement.pending, placement.output, self._channel)
        if not placement.pending or self._channel.worker not in placement.output.workers:
            return part
        bias = call.parameter("out_proj.bias" if shape.kind == "attention" else "bias")
        if bias is None:
            return part
        view = [1] * len(part.shape)
        view[shape.features] = -1
        return part.with_local(part.local + bias.to(part.local.dtype).view(view))

    def _read(self, name: str, layout: Layout, users: tuple[int, ...]) -> Part:
        part = self._values[name]
        source = self._model.shapes.by_name[name]
        if source.kind == "input" and layout != part.layout:
            given = self._given[self._model.traced.by_name[name].node]  # type: ignore[index]
            part = part_of_whole(given, layout, self._channel.worker)
        return spread(part, layout, users, self._channel)

    def _run_everywhere(self, operation: Operation, placement: Placement, number: int) -> Any:
        """A layer without a rule, on whole tensors, on every worker alike."""
        self._channel.at(operation.shape.name, SECTIONS * number)
        for name in operation.layer.sources:
            node = self._model.traced.by_name[name].node
            assert node is not None
            value = self._values[name]
            if isinstance(value, Part):
                layout = whole(self._everyone, len(value.shape))
                value = moved(value, layout, self._channel).local
            self._everywhere.env[node] = value
        seed = self._draws.generator(number).initial_seed()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for node in operation.layer.nodes:
                self._everywhere.env[node] = self._everywhere.run_node(node)
        assert operation.layer.node is not None
        value = self._everywhere.env[operation.layer.node]
        self._everywhere.env.clear()
        if not isinstance(value, torch.Tensor):
            return value
        layout = whole(self._everyone, value.dim())
        part = Part(value, tuple(value.shape), layout, self._channel.worker)
        return moved(part, placement.output, self._channel) if value.dim() else part


class _Everywhere(fx.Interpreter):
    """Interpreter of single nodes, with the values that others are given beforehand."""
