"""Operations of a traced model's layers, and the facts about them from which a grid is planned.

A layer for which there is no rule, or whose use no rule describes, is ``whole``: it can be computed
from all of what it reads, on every worker. FLOPs are those of products of matrices; all else is
bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from elbowroom.core.errors import InputError
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.training.operations.call import Found, NoRuleError, Tensor
from elbowroom.training.operations.operation import Operation
from elbowroom.training.operations.read import Reader
from elbowroom.training.operations.table import IMAGE_FIRST, LAST_FIRST
from elbowroom.training.traced import TracedLayer, TracedModel


def operations_of(traced: TracedModel) -> tuple[Operation, ...]:
    """What each layer of a model does, in order; a layer ``output`` is left out.

    Trace the model with ``leaves``. Raises InputError for a model whose inputs have no batch, that
    reads a tensor after another layer wrote into it, or writes into a buffer through another layer.
    """
    _check_writes(traced)
    batch = _batch_of(traced)
    finder = _Finder(traced, batch)
    return tuple(finder.operation(layer) for layer in traced.layers if layer.value is not None)


def shapes_of(traced: TracedModel, operations: Sequence[Operation] | None = None) -> ModelShapes:
    """Facts of a model's layers, without seconds; ``operations`` are its own, if they are known.

    Raises as ``operations_of`` does.
    """
    found = operations_of(traced) if operations is None else operations
    shapes = tuple(operation.shape for operation in found)
    return ModelShapes(shapes, traced.results, _batch_of(traced), _element_bytes(traced))


class _Finder:
    """Search for what each layer does, in order."""

    def __init__(self, traced: TracedModel, batch: int) -> None:
        self._traced, self._batch = traced, batch
        self._reader = Reader(traced)
        self._batched: set[str] = set()
        self._buffers = {name for name, _ in traced.model.named_buffers()}

    def operation(self, layer: TracedLayer) -> Operation:
        out = _output_of(layer)
        found: Found | None = None
        if layer.is_input:
            found = Found("input", (), features=self._input_features(layer, out))
        else:
            try:
                found = self._reader.found(layer, out)
                self._check(layer, found, out)
            except NoRuleError:
                found = None
        if found is None:
            return self._whole(layer, out)
        features = self._features_of(found, out)
        self._know(layer, out, features, is_read=_is_plain(layer) or found.kind == "attention")
        parameters = dict(found.parameters or {})
        shape = LayerShape(
            name=layer.name,
            kind=found.kind,
            sources=found.sources,
            shape=out.shape,
            features=features,
            windows=found.windows,
            weights=self._count(parameters, found.matrices),
            biases=self._count(parameters, {*parameters} - {*found.matrices}),
            groups=found.groups,
            order=found.order,
            flops=found.flops,
            has_batch=layer.name in self._batched,
        )
        return Operation(layer, shape, parameters, found.settings)

    def _whole(self, layer: TracedLayer, out: Tensor) -> Operation:
        stored = self._reader.stored(layer)
        features = self._inherited(layer.sources, out)
        self._know(layer, out, features, is_read=_is_plain(layer))
        count = self._count(stored, stored)
        shape = LayerShape(
            layer.name,
            "whole",
            layer.sources,
            out.shape,
            features,
            biases=count,
            has_batch=layer.name in self._batched,
        )
        return Operation(layer, shape, stored)

    def _know(self, layer: TracedLayer, out: Tensor, features: int, *, is_read: bool) -> None:
        """Note what a layer gives, for those that read it as a tensor or do not."""
        if is_read:
            self._reader.tensors[layer.name] = out._replace(features=features)
        has_batch = bool(out.shape) and out.shape[0] == self._batch
        if has_batch and (layer.is_input or self._batched.intersection(layer.sources)):
            self._batched.add(layer.name)

    def _check(self, layer: TracedLayer, found: Found, out: Tensor) -> None:
        """Whether it has samples, and changes nothing but running statistics."""
        changes = self._buffers.intersection(layer.state)
        if found.kind != "batch_norm" and changes:
            raise NoRuleError("it may change a buffer")
        if not _is_plain(layer) and found.kind != "attention":
            raise NoRuleError("it gives no tensor")
        shapes = [self._reader.tensors[n].shape for n in found.sources if n in self._batched]
        if not out.shape or out.shape[0] != self._batch or not shapes:
            raise NoRuleError("it has no batch")
        if found.kind != "elementwise" and len(shapes) != len(found.sources):
            raise NoRuleError("a source has no batch")
        if not any(len(shape) == len(out.shape) for shape in shapes) and not _reshapes(found):
            raise NoRuleError("it has no batch")

    def _features_of(self, found: Found, out: Tensor) -> int:
        if found.features is not None:
            return found.features
        return self._inherited(found.sources, out)

    def _inherited(self, sources: tuple[str, ...], out: Tensor) -> int:
        """Those of the first source with as many dimensions, else the last."""
        for source in sources:
            tensor = self._reader.tensors.get(source)
            if tensor is not None and len(tensor.shape) == len(out.shape):
                return tensor.features
        return 1 if len(out.shape) > 3 else max(1, len(out.shape) - 1)

    def _input_features(self, layer: TracedLayer, out: Tensor) -> int:
        """As the nearest layer needs them for which that matters."""
        num_dims = len(out.shape)
        names = {layer.name}
        for other in self._traced.layers:
            if not names.intersection(other.sources):
                continue
            names.add(other.name)
            spelling = self._reader.spelling(other)
            if spelling is not None and spelling.rule in IMAGE_FIRST:
                return 1
            if spelling is not None and spelling.rule in LAST_FIRST:
                break
        else:
            return 1 if num_dims > 3 else max(1, num_dims - 1)
        return max(1, num_dims - 1)

    def _count(self, parameters: Mapping[str, str], roles: object) -> int:
        """Elements of the parameters, not buffers, with these roles."""
        assert isinstance(roles, tuple | set | dict)
        tensors = [self._reader.state.tensors[parameters[r]] for r in roles if r in parameters]
        return sum(each.numel() for each in tensors if isinstance(each, torch.nn.Parameter))


def _reshapes(found: Found) -> bool:
    return found.kind in ("reshape", "global_pool", "embedding")


def _is_plain(layer: TracedLayer) -> bool:
    value = layer.value
    return value is not None and value.is_plain and len(value.tensors) == 1


def _output_of(layer: TracedLayer) -> Tensor:
    """The layer's tensor, or the first of several."""
    assert layer.value is not None
    first = layer.value.tensors[0]
    return Tensor((*first.shape,), first.dtype)


def _batch_of(traced: TracedModel) -> int:
    for layer in traced.layers:
        if layer.is_input and _is_plain(layer) and (shape := _output_of(layer).shape):
            return shape[0]
    raise InputError(
        "the model has no input that is a tensor with a batch: give it one, in its first dimension"
    )


def _check_writes(traced: TracedModel) -> None:
    for writer, reader in traced.stale:
        raise InputError(
            f"layer '{writer}' writes into what '{reader}' reads later: write it out of place"
        )
    buffers = {name for name, _ in traced.model.named_buffers()}
    for layer in traced.layers:
        if layer.overwrites and (written := buffers.intersection(layer.state)):
            raise InputError(
                f"layer '{layer.name}' writes into the buffer '{min(written)}' through "
                f"'{layer.overwrites[0]}': write all of it at once, with copy_"
            )


def _element_bytes(traced: TracedModel) -> int:
    tensors = [*traced.model.parameters()]
    sizes = [each.element_size() for each in tensors if each.is_floating_point()]
    inputs = [facts.dtype.itemsize for facts in traced.tensors.values()]
    return math.prod((sizes or inputs)[:1])
