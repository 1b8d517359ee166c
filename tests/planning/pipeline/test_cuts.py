"""Cuts: all of a small graph, some of a large one, and each what its layers say."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import Edge, Layer, LayerGraph
from elbowroom.planning.pipeline.cuts import Cuts, find_cuts
from tests.planning.pipeline.pipelines import chain, crossing_bytes, downsets, graph, profile


def wide(num_branches: int, length: int) -> LayerGraph:
    """A layer, branches, and a layer that joins them: (length + 1) ** branches + 2 cuts."""
    edges = []
    last = num_branches * length + 1
    for branch in range(num_branches):
        inside = [1 + branch * length + number for number in range(length)]
        path = [0, *inside, last]
        edges += list(pairwise(path))
    layers = [(0.001 * (i % 5 + 1), 100 + i * 37 % 50, i * 10) for i in range(last + 1)]
    return graph(layers, edges)


def check_cuts(cuts: Cuts) -> None:
    layers = cuts.graph.layers
    members = [cuts.members(index) for index in range(cuts.num_cuts)]
    for index, before in enumerate(members):
        for layer in before:
            assert before.issuperset(cuts.graph.sources[layer])
        assert cuts.crossing_bytes[index] == crossing_bytes(cuts.graph, before)
        assert cuts.seconds[index] == pytest.approx(sum(layers[i].seconds for i in before))
        assert cuts.parameter_bytes[index] == sum(layers[i].parameter_bytes for i in before)
        assert cuts.output_bytes[index] == sum(layers[i].activation_bytes for i in before)
        for other, behind in enumerate(members):
            assert cuts.holds[index, other] == (before < behind)
    assert members[0] == frozenset()
    assert len(members[-1]) == len(layers)
    assert [len(before) for before in members] == sorted(len(before) for before in members)


def test_a_chain_falls_out_as_itself() -> None:
    cuts = find_cuts(chain([(0.001, 5, 7)] * 6), 7)
    check_cuts(cuts)
    assert cuts.is_exact
    assert [len(cuts.members(index)) for index in range(7)] == list(range(7))
    assert cuts.layers_between(2, 4) == ("n2", "n3")


def test_all_cuts_of_branches() -> None:
    layers = wide(3, 2)
    cuts = find_cuts(layers, 29)
    check_cuts(cuts)
    assert cuts.is_exact
    assert [cuts.members(index) for index in range(29)] == downsets(layers)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(2, 40))
def test_some_cuts_of_branches(num_branches: int, length: int, most: int) -> None:
    cuts = find_cuts(wide(num_branches, length), most)
    check_cuts(cuts)
    assert cuts.num_cuts <= most
    num_all = (length + 1) ** num_branches + 2
    assert cuts.is_exact == (num_all <= most)
    assert cuts.is_exact == (cuts.num_cuts == num_all)


def test_a_tensor_crosses_once_however_many_read_it() -> None:
    layers = graph([(0.1, 7, 0), (0.1, 5, 0), (0.1, 3, 0), (0.1, 1, 0)], [(0, 1), (0, 2), (0, 3)])
    cuts = find_cuts(layers, 100)
    assert cuts.crossing_bytes.tolist() == [0, *[7] * 7, 0]


def test_inputs_and_idle_outputs_are_set_aside() -> None:
    layers = LayerGraph(
        (
            Layer("data", 0.5, 0.0, 100, 0, "Input0"),
            Layer("state", 0.0, 0.0, 0, 0, "hidden"),
            Layer("part", 0.0, 0.0, 0, 0, "element of hidden"),
            Layer("work", 1.0, 2.0, 10, 4),
            Layer("rest", 0.0, 0.0, 9, 0),
            Layer("of rest", 0.0, 0.0, 9, 0),
            Layer("loss", 1.0, 1.0, 8, 4),
        ),
        tuple(
            Edge(*pair.split(">"))
            for pair in (
                *("data>work", "state>part", "part>loss", "work>rest", "rest>of rest"),
                *("work>loss", "data>loss"),
            )
        ),
    )
    cuts = find_cuts(layers, 10)
    assert cuts.num_cuts == 3
    assert cuts.layers_between(0, 1) == ("data", "state", "part", "work", "rest", "of rest")
    assert cuts.layers_between(1, 2) == ("loss",)
    assert cuts.seconds.tolist() == [0, 3, 5], "loading is not counted"
    assert cuts.crossing_bytes.tolist() == [0, 10, 0], "nor is what is loaded"
    assert cuts.output_bytes.tolist() == [0, 110, 118], "but it is kept; idle outputs are not"


def test_cuts_between_layers_that_share_weights_make_no_room_scarce() -> None:
    """Each second one is cheap, and between layers that share weights."""
    layers = chain([(0.1, 1 + number % 2, 1) for number in range(300)])
    tied = tuple((f"n{number}", f"n{number + 1}") for number in range(0, 300, 2))
    cuts = find_cuts(replace(layers, tied=tied), 100)
    assert cuts.num_cuts == 100
    assert all(len(cuts.members(index)) % 2 == 0 for index in range(100))


def test_layers_that_share_weights_with_inputs_lie_in_the_first_stage() -> None:
    layers = LayerGraph(
        (Layer("data", 0, 0, 1, 0, "Input0"), *chain([(0.1, 1, 1)] * 3).layers),
        (Edge("data", "n0"), Edge("n0", "n1"), Edge("n1", "n2")),
        tied=(("data", "n1"),),
    )
    cuts = find_cuts(layers, 10)
    assert cuts.layers_between(0, 1) == ("data", "n0", "n1")
    assert cuts.num_cuts == 3


def test_nothing_to_cut() -> None:
    with pytest.raises(InputError, match="no layer takes time or memory"):
        find_cuts(chain([(0.0, 0, 0)] * 3), 10)


def test_long_chains_keep_cheap_cuts() -> None:
    layers = chain([(0.001, 1000 if i % 4 else 1, 1) for i in range(400)])
    cuts = find_cuts(layers, 52)
    assert 50 <= cuts.num_cuts <= 52
    assert cuts.crossing_bytes[1:-1].max() == 1


def test_wide_graphs_are_bounded() -> None:
    start = time.perf_counter()
    cuts = find_cuts(wide(1500, 2), 1000)
    assert not cuts.is_exact
    assert cuts.num_cuts <= 1000
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(("name", "is_exact"), [("gnmt", True), ("inception_v3", False)])
def test_cuts_of_profiles(name: str, is_exact: bool) -> None:
    cuts = find_cuts(profile(name), 1400)
    assert cuts.is_exact == is_exact
    assert cuts.num_cuts <= 1400
