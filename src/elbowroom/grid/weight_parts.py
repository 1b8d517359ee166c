"""Which part of each parameter a worker uses in a layer, and with whom it sums the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elbowroom.core.layer_shapes import Kind
from elbowroom.core.windows import NOTHING, Interval, part_of
from elbowroom.plans.grid_layout import Layout
from elbowroom.plans.grid_placement import Placement, broadcast
from elbowroom.training.operations.operation import Operation

Intervals = tuple[tuple[Interval, ...], ...]
"""For each dimension of a parameter the intervals that a worker has of it, one behind the other."""

_FEATURE_DIMS: dict[Kind, tuple[int, int]] = {
    "conv": (0, 1),
    "conv_transpose": (1, 0),
    "linear": (0, 1),
    "embedding": (1, 0),
}
"""Dimensions of a weight that have the output and the input features."""


@dataclass(frozen=True)
class WeightUse:
    """How a layer uses a parameter or buffer.

    Args:
        layer: its name.
        role: the parameter's role in it, such as "weight".
        name: the parameter's name in the model.
        shape: of the whole parameter.
        layout: its parts on the workers that have the layer.
        repeats: blocks along the first dimension, each of which is split alike: 3 for the queries,
            keys and values of an attention.
        units: elements along the split dimension that stay together: those of a head.
        sharers: digits of the workers whose gradients are summands.
        is_product: whether it is split as a factor of the layer's product, and so can be stored so.

    """

    layer: str
    role: str
    name: str
    shape: tuple[int, ...]
    layout: Layout
    sharers: tuple[int, ...]
    is_product: bool
    repeats: int = 1
    units: int = 1

    @property
    def is_split(self) -> bool:
        return bool(self.layout.used)

    @property
    def users(self) -> tuple[int, ...]:
        """Digits of all workers that use some of the parameter where each has it whole."""
        return tuple(sorted({*self.sharers, *self.layout.used}))

    def part(self, worker: int) -> Intervals:
        """A worker's part; of the first dimension nothing, for one that has not the layer."""
        found = [self._intervals(worker, dim, size) for dim, size in enumerate(self.shape)]
        if worker not in self.layout.workers:
            found[:1] = [(NOTHING,)]
        return tuple(found)

    def owner(self, worker: int) -> int:
        """The first worker with the same part, or of all that have any, for one that has none."""
        if worker not in self.layout.workers:
            return self.layout.first
        return self.layout.group(worker, self.layout.replicas)[0]

    def _intervals(self, worker: int, dim: int, size: int) -> tuple[Interval, ...]:
        layout = self.layout
        if not layout.dims[dim]:
            return (Interval(0, size),)
        repeats = self.repeats if dim == 0 else 1
        block = size // repeats
        count = block // self.units
        start, stop = part_of(count, layout.parts[dim], layout.index(worker, dim))
        return tuple(
            Interval(k * block + start * self.units, k * block + stop * self.units)
            for k in range(repeats)
        )


def weight_uses(
    operation: Operation, placement: Placement, shapes: dict[str, tuple[int, ...]]
) -> list[WeightUse]:
    """All uses of one layer; ``shapes`` are those of the model's parameters and buffers."""
    layer = operation.shape
    uses = []
    for role, name in operation.parameters.items():
        shape = shapes[name]
        if layer.kind == "whole":
            layout = placement.computed.with_dims(((),) * len(shape))
            use = WeightUse(layer.name, role, name, shape, layout, (), False)
        elif layer.kind == "attention":
            use = _of_attention(operation, placement, role, name, shape)
        elif layer.is_weighted and (role == "weight" or not placement.pending):
            use = _of_product(operation, placement, role, name, shape)
        else:
            use = _of_output(operation, placement, role, name, shape)
        uses.append(use)
    return uses


def _of_product(
    operation: Operation, placement: Placement, role: str, name: str, shape: tuple[int, ...]
) -> WeightUse:
    digits: list[tuple[int, ...]] = [()] * len(shape)
    if role == "weight":
        outputs, inputs = _FEATURE_DIMS[operation.shape.kind]
        digits[outputs], digits[inputs] = placement.outputs, placement.inputs
    else:
        digits[0] = placement.outputs
    return WeightUse(
        operation.shape.name,
        role,
        name,
        shape,
        placement.computed.with_dims(digits),
        placement.sharers,
        True,
    )


def _of_attention(
    operation: Operation, placement: Placement, role: str, name: str, shape: tuple[int, ...]
) -> WeightUse:
    """Queries, keys and values are split by heads, and the output's weights by their inputs."""
    layer, outputs = operation.shape, placement.outputs
    if role == "out_proj.bias" and placement.pending:
        return _of_output(operation, placement, role, name, shape)
    digits: list[tuple[int, ...]] = [()] * len(shape)
    if role in ("in_proj_weight", "in_proj_bias"):
        digits[0] = outputs
    elif role == "out_proj.weight":
        digits[1] = outputs
    sharers = placement.sharers
    if role == "attn_mask":  # a trained one has a summand of its gradient from each head
        sharers = tuple(sorted({*sharers, *outputs}))
    return WeightUse(
        layer.name,
        role,
        name,
        shape,
        placement.computed.with_dims(digits),
        sharers,
        True,
        repeats=3 if role.startswith("in_proj") else 1,
        units=layer.num_features // layer.groups,
    )


def _of_output(
    operation: Operation, placement: Placement, role: str, name: str, shape: tuple[int, ...]
) -> WeightUse:
    """What is applied to each element of the output: a norm's scale, a bias after a sum."""
    layer = operation.shape
    layout = placement.output if layer.is_weighted else placement.computed
    if layer.kind == "elementwise":
        own = broadcast(layout, layer.shape, shape)
    else:
        is_of_features = shape == (layer.num_features,)
        own = layout.with_dims([layout.dims[layer.features] if is_of_features else ()] * len(shape))
    return WeightUse(layer.name, role, name, shape, own, layout.used, False)


def cut_intervals(whole: torch.Tensor, part: Intervals) -> torch.Tensor:
    """A part of a whole parameter: a view where each dimension has one interval."""
    for dim, intervals in enumerate(part):
        pieces = [whole.narrow(dim, start, stop - start) for start, stop in intervals]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return whole


def put_intervals(whole: torch.Tensor, part: Intervals, piece: torch.Tensor) -> None:
    """Write a part into a whole parameter."""
    if not part:
        whole.copy_(piece)
        return
    at = 0
    for start, stop in part[0]:
        rows = piece.narrow(0, at, stop - start) if len(part[0]) > 1 else piece
        place = whole.narrow(0, start, stop - start)
        _put_rest(place, part, rows, 1)
        at += stop - start


def _put_rest(place: torch.Tensor, part: Intervals, piece: torch.Tensor, dim: int) -> None:
    for later in range(dim, len(part)):
        ((start, stop),) = part[later]
        place = place.narrow(later, start, stop - start)
    place.copy_(piece)
