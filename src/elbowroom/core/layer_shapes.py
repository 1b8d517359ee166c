"""Facts about the layers of a model from which a grid is planned: kinds, shapes, windows, work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from elbowroom.core.errors import InputError, shown
from elbowroom.core.files import read_as, unversioned, versioned, write_json
from elbowroom.core.values import check_flag, check_whole, is_whole
from elbowroom.core.windows import AxisWindow, Resize, TransposedWindow, Window

_WHAT, _VERSION = "layer shapes", 1
_MOST = 10**15
_MOST_LAYERS = 10_000

Kind = Literal[
    "input",
    "conv",
    "conv_transpose",
    "linear",
    "embedding",
    "attention",
    "dot_attention",
    "max_pool",
    "avg_pool",
    "global_pool",
    "resize",
    "batch_norm",
    "group_norm",
    "layer_norm",
    "pointwise",
    "dropout",
    "elementwise",
    "cat",
    "reshape",
    "permute",
    "whole",
]
"""What a layer does, and so how it can be split. ``whole``: it has no rule, and runs everywhere."""

WEIGHTED: tuple[Kind, ...] = ("conv", "conv_transpose", "linear", "embedding", "attention")
"""Kinds of layers for which a plan names a grid."""

WINDOWED: tuple[Kind, ...] = ("conv", "conv_transpose", "max_pool", "avg_pool", "resize")
"""Kinds of layers that read neighbouring rows in space."""

_WINDOWS = {"window": Window, "transposed": TransposedWindow, "resize": Resize}


@dataclass(frozen=True)
class LayerShape:
    """One layer of a traced model.

    Args:
        name: as traced.
        kind: what it does.
        sources: names of the layers that it reads, tensors only, in the order of its arguments.
        shape: of its output, the batch's dimension first, with the batch that was traced.
        features: which dimension of ``shape`` has the features (channels): 1 for convolutions, the
            last for linear layers. Those between the batch and them, or behind them, are space.
        windows: for each dimension of space, in order, of a layer that has windows.
        weights: elements of its matrix, table or kernels, which can be split.
        biases: elements of its other parameters: biases, scales of a norm.
        groups: of a convolution or a norm; heads of an attention.
        order: of a ``permute``, the source's dimension for each of its own.
        flops: of the forward of the whole batch; a multiplication and an addition are two.
        has_batch: whether the first dimension is the batch's, or in proportion to it.
        forward_seconds, backward_seconds: as measured on one worker with that batch; 0: unknown.

    Raises InputError for numbers that make no sense.

    """

    name: str
    kind: Kind
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    features: int = 1
    windows: tuple[AxisWindow, ...] = ()
    weights: int = 0
    biases: int = 0
    groups: int = 1
    order: tuple[int, ...] = ()
    flops: float = 0.0
    has_batch: bool = True
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a layer is named {shown(self.name)}: give each layer a name")
        if self.kind not in get_args(Kind):
            raise InputError(f"layer '{self.name}' is of kind {shown(self.kind)}: it is not known")
        for size in self.shape:
            check_whole(f"layer '{self.name}': a size", size, _MOST)
        for key in ("weights", "biases"):
            check_whole(f"layer '{self.name}': {key}", getattr(self, key), _MOST)
        check_whole(f"layer '{self.name}': groups", self.groups, _MOST, least=1)
        for key in ("flops", "forward_seconds", "backward_seconds"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise InputError(f"layer '{self.name}': {key} is {shown(value)}: give a number")
        check_flag(f"layer '{self.name}': has_batch", self.has_batch)
        if self.shape and not -1 < self.features < max(2, len(self.shape)):
            raise InputError(f"layer '{self.name}': its features are no dimension of its output")

    @property
    def is_weighted(self) -> bool:
        return self.kind in WEIGHTED

    @property
    def space(self) -> tuple[int, ...]:
        """Dimensions of the output that are neither the batch nor features."""
        return tuple(dim for dim in range(1, len(self.shape)) if dim != self.features)

    @property
    def space_sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in self.space)

    @property
    def num_features(self) -> int:
        return self.shape[self.features] if self.features < len(self.shape) else 1

    @property
    def num_elements(self) -> int:
        """Elements of the output, of the whole batch."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShapes:
    """Layers of a model, each after those that it reads.

    Args:
        layers: in the order in which they run.
        results: names of the layers whose outputs the model returns.
        batch: samples that it was traced with.
        element_bytes: size of an element of weights and activations.

    Raises InputError for layers that are named twice or read before they run.

    """

    layers: tuple[LayerShape, ...]
    results: tuple[str, ...]
    batch: int
    element_bytes: int = 4

    def __post_init__(self) -> None:
        check_whole("batch", self.batch, _MOST, least=1)
        check_whole("element_bytes", self.element_bytes, 64, least=1)
        check_whole("the number of layers", len(self.layers), _MOST_LAYERS, least=1)
        known: set[str] = set()
        for layer in self.layers:
            if layer.name in known:
                raise InputError(f"two layers are named '{layer.name}': give each its own name")
            if unknown := [name for name in layer.sources if name not in known]:
                raise InputError(f"layer '{layer.name}' reads '{unknown[0]}', which has not run")
            known.add(layer.name)
        if missing := [name for name in self.results if name not in known]:
            raise InputError(f"no layer is named '{missing[0]}', which the model returns")

    @cached_property
    def by_name(self) -> dict[str, LayerShape]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """For each layer the names of those that read it, in the order in which they run."""
        found: dict[str, list[str]] = {layer.name: [] for layer in self.layers}
        for layer in self.layers:
            for source in dict.fromkeys(layer.sources):
                found[source].append(layer.name)
        return {name: tuple(readers) for name, readers in found.items()}

    @property
    def weighted(self) -> tuple[LayerShape, ...]:
        """The layers for which a plan names a grid."""
        return tuple(layer for layer in self.layers if layer.is_weighted)

    @property
    def num_weights(self) -> int:
        return sum(layer.weights + layer.biases for layer in self.layers)

    def for_batch(self, batch: int) -> ModelShapes:
        """The same model with ``batch`` samples.

        Sizes of the first dimension, FLOPs and seconds grow in proportion, but of outputs that have
        no batch.
        """
        if batch == self.batch:
            return self
        layers = tuple(self._scaled(layer, batch) for layer in self.layers)
        return replace(self, layers=layers, batch=batch)

    def _scaled(self, layer: LayerShape, batch: int) -> LayerShape:
        if not layer.has_batch or not layer.shape:
            return layer
        factor = batch / self.batch
        return replace(
            layer,
            shape=(layer.shape[0] // self.batch * batch, *layer.shape[1:]),
            flops=layer.flops * factor,
            forward_seconds=layer.forward_seconds * factor,
            backward_seconds=layer.backward_seconds * factor,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **versioned(_WHAT, _VERSION),
            "batch": self.batch,
            "element_bytes": self.element_bytes,
            "results": list(self.results),
            "layers": [_layer_to_json(layer) for layer in self.layers],
        }

    @staticmethod
    def from_json(data: Any) -> ModelShapes:
        """Build it from its JSON form. Raises InputError for what ``to_json`` never writes."""
        data = unversioned(data, _WHAT, _VERSION)
        try:
            return ModelShapes(
                tuple(_layer(layer) for layer in data["layers"]),
                tuple(data["results"]),
                data["batch"],
                data["element_bytes"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"no layer shapes: {error}") from error


def read_model_shapes(path: Path) -> ModelShapes:
    """Read the shapes of a model from a JSON file. Raises InputError."""
    return read_as(path, ModelShapes.from_json)


def write_model_shapes(path: Path, shapes: ModelShapes) -> None:
    """Write a JSON file that ``read_model_shapes`` reads. Raises OutputError."""
    write_json(path, shapes.to_json())


def _layer_to_json(layer: LayerShape) -> dict[str, Any]:
    data = asdict(layer)
    names = {kind: name for name, kind in _WINDOWS.items()}
    data["windows"] = [{"is": names[type(each)], **asdict(each)} for each in layer.windows]
    defaults = {"windows": [], "order": (), "weights": 0, "biases": 0, "groups": 1, "flops": 0.0}
    defaults |= {"has_batch": True, "forward_seconds": 0.0, "backward_seconds": 0.0}
    return {key: value for key, value in data.items() if value != defaults.get(key, object())}


def _layer(data: Mapping[str, Any]) -> LayerShape:
    lists = {key: _wholes(key, data.get(key, ())) for key in ("shape", "order")}
    windows = tuple(_window(each) for each in data.get("windows", ()))
    sources = tuple(data["sources"])
    return LayerShape(**{**data, **lists, "sources": sources, "windows": windows})


def _wholes(key: str, values: Any) -> tuple[int, ...]:
    if not all(is_whole(value) for value in values):
        raise InputError(f"{key} is {shown(values)}: give whole numbers")
    return tuple(values)


def _window(data: Mapping[str, Any]) -> AxisWindow:
    kind = _WINDOWS.get(data["is"])
    if kind is None:
        raise InputError(f"a window is {shown(data['is'])}: give one of {', '.join(_WINDOWS)}")
    window: AxisWindow = kind(**{key: value for key, value in data.items() if key != "is"})
    return window
