"""Reader and writer for the text format of the PipeDream authors' profiles.

One line for each layer, then one for each edge, which begins with a tab::

    id -- description -- forward_compute_time=ms, backward_compute_time=ms, \
activation_size=bytes, parameter_size=bytes
    <tab>source -- destination

An activation size may be a list, ``[a; b]``: the output is all of it, so the sizes are added.
Fractions of bytes, which averages have, are rounded. The suffix ``-- stage_id=3``, which the
authors' partitioner appends, is ignored.
"""

from __future__ import annotations

import re
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import (
    MAX_EDGES,
    MAX_LAYERS,
    Edge,
    Layer,
    LayerGraph,
    parse_layer_graph,
    read_text,
)

_SEPARATOR = " -- "
_KEYS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_FORM = f"id{_SEPARATOR}description{_SEPARATOR}" + ", ".join(f"{key}=..." for key in _KEYS)
_STAGE = re.compile(r" -- stage_id=\d+$")
_LONGEST_NUMBER = 60
_LONGEST_LINE = 20_000


def read_layer_graph(path: Path) -> LayerGraph:
    """Read a profile: our JSON, or the authors' text.

    Raises InputError with the file and, for text, the number of the offending line.
    """
    text = read_text(path)
    try:
        if text.lstrip().startswith("{"):
            return parse_layer_graph(text)
        return parse_pipedream(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse_pipedream(text: str) -> LayerGraph:
    """Parse the authors' text. Raises InputError with the number of the offending line."""
    layers: dict[str, Layer] = {}
    edges: dict[Edge, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            if len(line) > _LONGEST_LINE:
                raise InputError(f"{len(line)} characters, at most {_LONGEST_LINE} are read")
            if line[0].isspace():  # a tab, or spaces where an editor has been
                _add_edge(edges, _parse_edge(line), number)
            else:
                _add_layer(layers, _parse_layer(line))
        except InputError as error:
            raise InputError(f"line {number}: {error}") from error
    for edge, number in edges.items():
        for name in edge:
            if name not in layers:
                raise InputError(f"line {number}: no line gives a layer '{name}'")
    return LayerGraph(tuple(layers.values()), tuple(edges))


def write_pipedream(graph: LayerGraph) -> str:
    """The graph in the authors' text format, which ``parse_pipedream`` reads back.

    The format has no room for memory, gradients, updates and tied weights: these are lost. Raises
    InputError for names and descriptions that the format cannot hold.
    """
    lines = [_layer_line(layer) for layer in graph.layers]
    lines += [f"\t{edge.source}{_SEPARATOR}{edge.destination}" for edge in graph.edges]
    return "\n".join(lines) + "\n"


def _layer_line(layer: Layer) -> str:
    numbers = (
        _milliseconds(layer.forward_seconds),
        _milliseconds(layer.backward_seconds),
        f"{layer.activation_bytes}.000",
        f"{layer.parameter_bytes}.000",
    )
    values = ", ".join(f"{key}={value}" for key, value in zip(_KEYS, numbers, strict=True))
    line = _SEPARATOR.join((layer.name, layer.description, values))
    if not _reads_back(line, layer):
        raise InputError(f"layer '{_shown(layer.name)}' cannot be written as a line: rename it")
    return line


def _reads_back(line: str, layer: Layer) -> bool:
    if line.splitlines() != [line] or len(line) > _LONGEST_LINE:
        return False
    try:
        return _parse_layer(line) == replace(
            layer, memory=None, gradient_bytes=None, update_seconds=0.0
        )
    except InputError:
        return False


def _parse_layer(line: str) -> Layer:
    line = _STAGE.sub("", line.rstrip())
    name, _, rest = line.partition(_SEPARATOR)
    description, separator, values = rest.rpartition(_SEPARATOR)
    if not separator or not name.strip():
        raise InputError(f"'{_shown(line)}' is no layer: write {_FORM}")
    found = dict(part.strip().partition("=")[::2] for part in values.split(","))
    missing = [key for key in _KEYS if key not in found]
    if missing or len(found) > len(_KEYS):
        raise InputError(f"{', '.join(missing) or 'more than four values'}: write {_FORM}")
    return Layer(
        name=name.strip(),
        forward_seconds=_seconds(_KEYS[0], found[_KEYS[0]]),
        backward_seconds=_seconds(_KEYS[1], found[_KEYS[1]]),
        activation_bytes=_activation_bytes(found[_KEYS[2]]),
        parameter_bytes=_bytes(_KEYS[3], found[_KEYS[3]]),
        description=description,
    )


def _parse_edge(line: str) -> Edge:
    source, separator, destination = line.strip().partition(_SEPARATOR)
    if not separator or not source.strip() or not destination.strip():
        raise InputError(f"'{_shown(line)}' is no edge: write <tab>source -- destination")
    return Edge(source.strip(), destination.strip())


def _add_layer(layers: dict[str, Layer], layer: Layer) -> None:
    if layer.name in layers:
        raise InputError(f"layer '{layer.name}' is given twice: give each an id of its own")
    if len(layers) == MAX_LAYERS:
        raise InputError(f"more than {MAX_LAYERS} layers: merge layers")
    layers[layer.name] = layer


def _add_edge(edges: dict[Edge, int], edge: Edge, number: int) -> None:
    if edge in edges:
        raise InputError(f"edge {edge.source} -- {edge.destination} is given twice")
    if len(edges) == MAX_EDGES:
        raise InputError(f"more than {MAX_EDGES} edges: merge layers")
    edges[edge] = number


def _seconds(key: str, text: str) -> float:
    # Shifting the decimal point is exact, so that a written number reads back the same.
    return float(_number(key, text).scaleb(-3))


def _milliseconds(seconds: float) -> str:
    return str(Decimal(repr(float(seconds))).scaleb(3))


def _activation_bytes(text: str) -> int:
    if text.startswith("[") and text.endswith("]"):
        return sum(_bytes(_KEYS[2], part) for part in text[1:-1].split(";"))
    return _bytes(_KEYS[2], text)


def _bytes(key: str, text: str) -> int:
    return int(_number(key, text).to_integral_value())


def _number(key: str, text: str) -> Decimal:
    text = text.strip()
    try:
        if len(text) > _LONGEST_NUMBER:
            raise InvalidOperation
        value = Decimal(text)
        if value.is_finite() and 0 <= value < Decimal("1e30"):
            return value
    except InvalidOperation:
        pass
    raise InputError(f"{key} is '{_shown(text)}': give a number that is not negative")


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
