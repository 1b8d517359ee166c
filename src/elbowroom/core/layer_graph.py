"""Facts about the layers of a model that is trained: times, sizes, and who reads whose output."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.files import unversioned, versioned
from elbowroom.core.values import check_whole

MAX_LAYERS = 10_000
MAX_EDGES = 100_000
MAX_FILE_BYTES = 64 * 1024**2
MAX_TOTAL_BYTES = 10**15
"""Limit on all layers' activations, and on their parameters: sums stay exact in 64 bits."""

MAX_TOTAL_SECONDS = 1e9
_WHAT, _VERSION = "layer graph", 1
_SHOWN = 6


class Edge(NamedTuple):
    """Dependency between two layers, by name: ``destination`` reads what ``source`` computes."""

    source: str
    destination: str


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that a layer needs in training, as measured with one minibatch.

    Live memory while this layer runs: what the stage's layers up to and including this one keep; in
    the backward also the weight gradients of the stage's later layers; and ``forward_bytes`` or
    ``backward_bytes``, the peak of this layer's own pass beyond that.

    Args:
        kept_bytes: kept for the backward, of what the layer makes: its output, if some backward
            reads it, and all intermediate results.
        loose_bytes: part of its output that no backward reads: kept only where it leaves a stage.
        forward_bytes: peak of its own forward.
        backward_bytes: peak of its own backward, gradients of its weights included.
        largest_parameter_bytes: size of its largest weight: optimizers update weights one by one.

    Raises InputError for numbers that are not valid byte counts.

    """

    kept_bytes: int
    loose_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    largest_parameter_bytes: int = 0

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            check_whole(f"memory: {key}", value, MAX_TOTAL_BYTES)

    def times(self, factor: float) -> LayerMemory:
        """The same layer with minibatches ``factor`` times as large; weights keep their size."""
        keys = ("kept_bytes", "loose_bytes", "forward_bytes", "backward_bytes")
        return replace(self, **{key: round(getattr(self, key) * factor) for key in keys})


@dataclass(frozen=True)
class Layer:
    """One layer, as measured on one worker with one minibatch.

    ``activation_bytes`` is the size of its output; ``gradient_bytes`` the size of that output's
    gradient (None: the same); ``parameter_bytes`` the size of its weights, which the optimizer
    changes in ``update_seconds``. Without ``memory`` the output is all that it keeps. Raises
    InputError for an empty name, and for numbers that are negative or not finite.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    activation_bytes: int
    parameter_bytes: int
    description: str = ""
    gradient_bytes: int | None = None
    memory: LayerMemory | None = None
    update_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a layer is named {self.name!r}: give each layer a name")
        if not isinstance(self.description, str):
            raise InputError(f"layer '{self.name}': its description must be text")
        for key in ("forward_seconds", "backward_seconds", "update_seconds"):
            value = getattr(self, key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= MAX_TOTAL_SECONDS:
                raise InputError(
                    f"layer '{self.name}': {key} is {value!r}: give seconds from 0 to "
                    f"{MAX_TOTAL_SECONDS:g}"
                )
        for key in ("activation_bytes", "parameter_bytes"):
            check_whole(f"layer '{self.name}': {key}", getattr(self, key), MAX_TOTAL_BYTES)
        check_whole(f"layer '{self.name}': gradient_bytes", self.returned_bytes, MAX_TOTAL_BYTES)

    @property
    def seconds(self) -> float:
        """Seconds of forward, backward and update for one minibatch."""
        return self.forward_seconds + self.backward_seconds + self.update_seconds

    @property
    def returned_bytes(self) -> int:
        """Size of the gradient of the layer's output."""
        return self.activation_bytes if self.gradient_bytes is None else self.gradient_bytes

    @property
    def memory_or_output(self) -> LayerMemory:
        """``memory``, or where it was not measured what the papers count: the output alone."""
        return self.memory or LayerMemory(
            self.activation_bytes, largest_parameter_bytes=self.parameter_bytes
        )

    @property
    def is_free(self) -> bool:
        """Whether the layer takes no time and has no parameters, like a view or a tuple element."""
        return self.seconds == 0 and self.parameter_bytes == 0


@dataclass(frozen=True)
class LayerGraph:
    """Layers, in any order, and the edges between them: an acyclic, connected graph.

    Each group in ``tied`` names layers that share weights, statistics or memory: one stage must
    have all of them. Raises InputError, with what is wrong, for an empty, cyclic or disconnected
    graph, for names that are unknown or given twice, and for sizes beyond the limits.
    """

    layers: tuple[Layer, ...]
    edges: tuple[Edge, ...]
    tied: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_names(self)
        stuck = len(self.layers) - len(self.order)
        if stuck:
            names = " -> ".join(_shortened(_find_cycle(self)))
            raise InputError(f"layers wait for each other: {names}: a graph of layers has no cycle")
        _check_connected(self)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Layer indices, each after all it reads; the earliest listed goes first."""
        waiting = [len(sources) for sources in self.sources]
        ready = [index for index, count in enumerate(waiting) if not count]
        order = []
        while ready:
            index = heapq.heappop(ready)
            order.append(index)
            for reader in self.readers[index]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    heapq.heappush(ready, reader)
        return tuple(order)

    @cached_property
    def index(self) -> dict[str, int]:
        """Layer index by layer name."""
        return {layer.name: index for index, layer in enumerate(self.layers)}

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """readers[i]: indices of the layers that read the output of layer i."""
        return self._neighbours([(edge.source, edge.destination) for edge in self.edges])

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """sources[i]: indices of the layers whose output layer i reads."""
        return self._neighbours([(edge.destination, edge.source) for edge in self.edges])

    def _neighbours(self, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.layers]
        for name, other in pairs:
            found[self.index[name]].append(self.index[other])
        return tuple(tuple(sorted(indices)) for indices in found)

    def for_batch(self, factor: float) -> LayerGraph:
        """The same graph for minibatches ``factor`` times as large.

        Forward and backward times, activations and gradients are assumed to grow in proportion to
        the batch. Raises InputError for a factor that is not positive.
        """
        if not 0 < factor < math.inf:
            raise InputError(f"a batch cannot be {factor} times as large: give a positive number")
        layers = tuple(
            replace(
                layer,
                forward_seconds=layer.forward_seconds * factor,
                backward_seconds=layer.backward_seconds * factor,
                activation_bytes=round(layer.activation_bytes * factor),
                gradient_bytes=_times(layer.gradient_bytes, factor),
                memory=layer.memory and layer.memory.times(factor),
            )
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        return {
            **versioned(_WHAT, _VERSION),
            "layers": [asdict(layer) for layer in self.layers],
            "edges": [list(edge) for edge in self.edges],
            "tied": [list(group) for group in self.tied],
        }

    @staticmethod
    def from_json(data: Any) -> LayerGraph:
        """Build a graph from its JSON form. Raises InputError for what ``to_json`` never writes."""
        data = unversioned(data, _WHAT, _VERSION)
        try:
            layers = tuple(_layer(layer) for layer in data["layers"])
            edges = tuple(Edge(*edge) for edge in data["edges"])
            tied = tuple(tuple(group) for group in data.get("tied", ()))
            return LayerGraph(layers, edges, tied)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"no layer graph: {error}") from error


def _layer(data: dict[str, Any]) -> Layer:
    memory = data.get("memory")
    return Layer(**{**data, "memory": memory and LayerMemory(**memory)})


def _times(num_bytes: int | None, factor: float) -> int | None:
    return None if num_bytes is None else round(num_bytes * factor)


def parse_layer_graph(text: str) -> LayerGraph:
    """Parse a graph from the text of our JSON form. Raises InputError."""
    try:
        return LayerGraph.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}") from error


def read_text(path: Path) -> str:
    """Read a profile's text. Raises InputError if it cannot be read, is empty or too large."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_BYTES:
            raise InputError(
                f"{path} has {num_bytes} bytes, a profile at most {MAX_FILE_BYTES}: merge layers"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise InputError(f"{path} is empty: give a profile with a line for each layer")
    return text


def _check_sizes(graph: LayerGraph) -> None:
    if not graph.layers:
        raise InputError("a graph without layers cannot be planned: profile the model again")
    for what, count, limit in (
        ("layers", len(graph.layers), MAX_LAYERS),
        ("edges", len(graph.edges), MAX_EDGES),
    ):
        if count > limit:
            raise InputError(f"{count} {what}, at most {limit} are planned: merge layers")
    for key, most in (
        ("seconds", MAX_TOTAL_SECONDS),
        ("activation_bytes", MAX_TOTAL_BYTES),
        ("parameter_bytes", MAX_TOTAL_BYTES),
    ):
        total: float = sum(getattr(layer, key) for layer in graph.layers)
        _check_total(key, total, most)
    kept = sum(
        layer.memory_or_output.kept_bytes + layer.memory_or_output.loose_bytes
        for layer in graph.layers
    )
    _check_total("bytes kept", kept, MAX_TOTAL_BYTES)


def _check_total(what: str, total: float, most: float) -> None:
    if total > most:
        raise InputError(f"{what} of all layers are {total:g}, more than {most:g}: check units")


def _check_names(graph: LayerGraph) -> None:
    for name, count in Counter(layer.name for layer in graph.layers).items():
        if count > 1:
            raise InputError(f"{count} layers are named '{name}': give each a name of its own")
    for edge, count in Counter(graph.edges).items():
        for name in edge:
            if name not in graph.index:
                raise InputError(f"edge {' -> '.join(map(str, edge))}: no layer is named '{name}'")
        if count > 1:
            raise InputError(f"edge {edge.source} -> {edge.destination} is given {count} times")
    for name in (name for group in graph.tied for name in group):
        if name not in graph.index:
            raise InputError(f"no layer is named '{name}', which is said to share weights")


def _check_connected(graph: LayerGraph) -> None:
    seen, queue = {0}, [0]
    while queue:
        index = queue.pop()
        for other in (*graph.readers[index], *graph.sources[index]):
            if other not in seen:
                seen.add(other)
                queue.append(other)
    apart = [layer.name for index, layer in enumerate(graph.layers) if index not in seen]
    if apart:
        raise InputError(
            f"no edge joins {', '.join(_shortened(apart))} with '{graph.layers[0].name}': "
            "a model is one piece"
        )


def _find_cycle(graph: LayerGraph) -> list[str]:
    """Names of the layers of one cycle; the first is repeated at the end."""
    stuck = set(range(len(graph.layers))) - set(graph.order)
    path, place = [min(stuck)], {min(stuck): 0}
    while True:
        # Every layer that never became ready reads another such layer, so this walk meets a cycle.
        source = next(other for other in graph.sources[path[-1]] if other in stuck)
        if source in place:
            cycle = [*path[place[source] :], source]
            return [graph.layers[index].name for index in reversed(cycle)]
        place[source] = len(path)
        path.append(source)


def _shortened(names: list[str]) -> list[str]:
    return names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "...", names[-1]]
