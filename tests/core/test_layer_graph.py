"""Layer graphs: both formats go there and back, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import (
    MAX_FILE_BYTES,
    MAX_LAYERS,
    Edge,
    Layer,
    LayerGraph,
    parse_layer_graph,
)
from elbowroom.core.layer_graph_file import parse_pipedream, read_layer_graph, write_pipedream
from tests.planning.pipeline.pipelines import PROFILES, profile

LINES = """\
node1 -- Input0 -- forward_compute_time=17.972, backward_compute_time=0.000, \
activation_size=77070336.000, parameter_size=0.000
node2 -- LSTM(2048, 1024) -- forward_compute_time=3.190, backward_compute_time=5.348, \
activation_size=[6291456.0; 131072.0; 131072.0], parameter_size=50364416.000
node3 -- Classifier(  (a): b -- c) -- forward_compute_time=1, backward_compute_time=2e-3, \
activation_size=4.4, parameter_size=0.000 -- stage_id=2

\tnode1 -- node2
\tnode2 -- node3
"""


def test_the_authors_format() -> None:
    graph = parse_pipedream(LINES)
    first, second, third = graph.layers
    assert first == Layer("node1", 0.017972, 0.0, 77070336, 0, "Input0")
    assert second.activation_bytes == 6291456 + 2 * 131072, "the parts of an output add up"
    assert second.seconds == pytest.approx(8.538e-3)
    assert third.description == "Classifier(  (a): b -- c)", "descriptions may have any text"
    assert (third.backward_seconds, third.activation_bytes) == (2e-6, 4)
    assert graph.edges == (Edge("node1", "node2"), Edge("node2", "node3"))
    assert graph.order == (0, 1, 2)
    assert (graph.sources[1], graph.readers[1]) == ((0,), (2,))


def test_profiles_go_there_and_back() -> None:
    profile("vgg16")
    paths = sorted(PROFILES.glob("*.graph.txt"))
    assert len(paths) == 14
    for path in paths:
        graph = read_layer_graph(path)
        assert parse_pipedream(write_pipedream(graph)) == graph
        assert parse_layer_graph(json.dumps(graph.to_json())) == graph


names = st.text("ab -\t\n'=,é", min_size=1, max_size=5)
numbers = st.floats(0, 1e6)
sizes = st.integers(0, 10**12)


@given(
    st.lists(st.builds(Layer, names, numbers, numbers, sizes, sizes, names), min_size=1, max_size=4)
)
def test_what_is_written_is_read(layers: list[Layer]) -> None:
    unique = {layer.name: layer for layer in layers}
    edges = tuple(Edge(first, second) for first, second in zip(unique, [*unique][1:], strict=False))
    graph = LayerGraph(tuple(unique.values()), edges)
    for tied in ((), (tuple(unique),)):
        whole = replace(graph, tied=tied)
        assert parse_layer_graph(json.dumps(whole.to_json())) == whole
    try:
        text = write_pipedream(graph)
    except InputError as error:
        assert "cannot be written" in str(error)
    else:
        assert parse_pipedream(text) == graph


@given(st.text("node12 -=,.[];()\t\nforward_compute_time", max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_pipedream, parse_layer_graph):
        try:
            parse(text)
        except InputError:
            continue


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("forward_compute_time=17.972", "forward_compute_time=-1", "line 1: forward_compute_time"),
        ("forward_compute_time=17.972", "forward_compute_time=NaN", "line 1: .* is 'NaN'"),
        ("forward_compute_time=17.972", "forward_compute_time=1e25", "line 1: .*give seconds"),
        ("activation_size=4.4", "activation_size=inf", "line 3: activation_size is 'inf'"),
        ("131072.0; 131072.0]", "131072.0; x]", "line 2: activation_size is ' x'|is 'x'"),
        ("parameter_size=50364416.000", "parameter_size=", "line 2: parameter_size is ''"),
        (", parameter_size=50364416.000", "", "line 2: parameter_size: write id -- desc"),
        ("node2 -- LSTM", "node2 LSTM", "line 2: .* is no layer"),
        ("node2 -- LSTM", "node1 -- LSTM", "line 2: layer 'node1' is given twice"),
        ("\tnode1 -- node2", "\tnode1 node2", "line 5: .* is no edge"),
        ("\tnode1 -- node2", "\tnode2 -- node3", "line 6: edge node2 -- node3 is given twice"),
        ("\tnode1 -- node2", "\tnode9 -- node2", "line 5: no line gives a layer 'node9'"),
        ("\tnode1 -- node2\n", "", "no edge joins node2, node3 with 'node1'"),
        ("\tnode1 -- node2", "\tnode3 -- node2", "node2 -> node3 -> node2|node3 -> node2 -> node3"),
        ("\tnode1 -- node2", "\tnode2 -- node2", "node2 -> node2: a graph"),
        ("77070336.000", "9" * 25, "line 1: .*activation_bytes is 9+: give a whole number"),
        ("77070336.000", "1e15", "activation_bytes of all layers are 1e.15, more than 1e.15"),
        ("node1 -- Input0", "n" * 30000, "line 1: 30.* characters"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in LINES
    path = tmp_path / "bad.txt"
    path.write_text(LINES.replace(old, new, 1))
    with pytest.raises(InputError, match=words) as caught:
        read_layer_graph(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 2', "version 2: this version reads 1"),
        ('"format": "', '"format": "x', "must be 'elbowroom layer graph'"),
        ('"forward_seconds": 0.5', '"forward_seconds": NaN', "forward_seconds is nan"),
        ('"forward_seconds": 0.5', '"forward_seconds": "1"', "forward_seconds is '1'"),
        ('"activation_bytes": 3', '"activation_bytes": 3.5', "activation_bytes is 3.5"),
        ('"activation_bytes": 3', '"activation_bytes": -3', "activation_bytes is -3"),
        ('"name": "a"', '"name": ""', "named ''"),
        ('"name": "a"', '"nom": "a"', "nom"),
        ('"name": "a"', '"name": "b"', "2 layers are named 'b'"),
        ('["a", "b"]', '["a", "c"]', "a -> c: no layer is named 'c'"),
        ('["a", "b"]', '["a"]', "no layer graph"),
        ('["a", "b"]', '["a", "b"], ["a", "b"]', "given 2 times"),
        ('["a", "b"]', '["a", "b"], ["b", "a"]', "wait for each other"),
        ('"edges": [', '"edges": [[', "not valid JSON"),
        ('"tied": [', '"tied": [["a", "c"]', "no layer is named 'c', which is said to share"),
        ('"tied": [', '"tied": [3', "no layer graph"),
    ],
)
def test_what_is_wrong_in_json_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    graph = LayerGraph((Layer("a", 0.5, 1.0, 3, 4), Layer("b", 1.0, 1.0, 5, 6)), (Edge("a", "b"),))
    text = json.dumps(graph.to_json())
    path = tmp_path / "graph.json"
    path.write_text(text)
    assert read_layer_graph(path) == graph
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=words):
        read_layer_graph(path)


def test_files_that_hold_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.txt"
    with pytest.raises(InputError, match="cannot read"):
        read_layer_graph(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(InputError, match="is empty"):
        read_layer_graph(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        read_layer_graph(path)
    path.write_text("{" * 100_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_layer_graph(path)
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(InputError, match="at most 67108864"):
        read_layer_graph(path)
    with pytest.raises(InputError, match="cannot read"):
        read_layer_graph(tmp_path)


def test_too_many_layers() -> None:
    lines = LINES.splitlines()[1]
    many = "\n".join(lines.replace("node2", f"n{number}") for number in range(MAX_LAYERS + 1))
    with pytest.raises(InputError, match=f"line {MAX_LAYERS + 1}: more than {MAX_LAYERS} layers"):
        parse_pipedream(many)
    with pytest.raises(InputError, match="without layers"):
        parse_pipedream("\n\n")


def test_another_batch() -> None:
    graph = parse_pipedream(LINES).for_batch(0.5)
    assert graph.layers[0] == Layer("node1", 0.017972 / 2, 0.0, 77070336 // 2, 0, "Input0")
    assert graph.layers[1].parameter_bytes == 50364416
    with pytest.raises(InputError, match="positive"):
        graph.for_batch(0)


@pytest.mark.parametrize("indent", [" ", "    "])
def test_edges_may_be_indented_with_spaces(indent: str) -> None:
    assert parse_pipedream(LINES.replace("\t", indent)) == parse_pipedream(LINES)
