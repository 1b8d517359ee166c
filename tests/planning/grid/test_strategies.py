"""Ways to split a layer."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.blocks import block_graph
from elbowroom.planning.grid.strategies import all_strategies, space_split
from tests.planning.grid.models import Shapes, convolutions, perceptron


@pytest.mark.parametrize(
    ("parts", "sizes", "split"),
    [
        (2, (8, 8), (2, 1)),
        (8, (14, 14), (4, 2)),
        (64, (16, 16, 16), (4, 4, 4)),
        (6, (9, 9), (2, 3)),
        (4, (1, 100), (1, 4)),
        (1, (), ()),
    ],
)
def test_space_is_split_evenly(parts: int, sizes: tuple[int, ...], split: tuple[int, ...]) -> None:
    assert space_split(parts, sizes) == split


@given(st.integers(1, 64), st.integers(1, 64))
def test_all_workers_are_used_and_none_has_nothing(procs: int, batch: int) -> None:
    shapes = convolutions(batch, 6, 3, 8, 8)
    graph = block_graph(shapes)
    for block, ways in zip(graph.blocks, all_strategies(graph, procs, batch, "all"), strict=True):
        assert len(set(ways.size)) == 1 and procs % ways.size[0] == 0
        assert (ways.batch <= batch).all() and (ways.outputs <= block.head.num_features).all()
        assert (ways.inputs <= block.num_inputs).all()
        assert (ways.space <= block.head.space_sizes).all() if ways.space.size else True


def test_forms_restrict_the_roles() -> None:
    graph = block_graph(convolutions(64, 8, 3, 16, 16))
    conv, _, fc = all_strategies(graph, 16, 64, "linear")
    assert (conv.outputs * conv.inputs == 1).all() and (conv.area > 1).any()
    assert (fc.area == 1).all() and (fc.inputs > 1).any()
    free, *_ = all_strategies(graph, 16, 64, "all")
    assert (free.outputs > 1).any()


def test_workers_that_cannot_all_be_used_compute_the_same() -> None:
    graph = block_graph(perceptron(1, 2, 3))
    (ways,) = all_strategies(graph, 8, 1, "all")
    assert set(ways.size) == {4}
    assert {(w.outputs[row], w.inputs[row]) for w in [ways] for row in range(w.count)} == {(2, 2)}


def test_a_group_norm_keeps_its_groups_together() -> None:
    net = Shapes(3, 8, 8, batch=8)
    norm = net.like("norm", "group_norm", net.conv("conv", "input", 16), biases=32, groups=4)
    graph = block_graph(net.built(net.conv("end", norm, 16)))
    ways, _ = all_strategies(graph, 16, 8, "all")
    assert set(ways.outputs) == {1, 2, 4}


def test_a_join_of_channels_keeps_them_together() -> None:
    graph = block_graph(known_net("unet3d"))
    ways = dict(
        zip((b.name for b in graph.blocks), all_strategies(graph, 8, 8, "all"), strict=True)
    )
    assert set(ways["cat0"].outputs) == {1}
    assert set(ways["down0.2.relu"].outputs) == {1, 2, 4, 8}


def test_flattened_channels_are_split_as_channels() -> None:
    """12 channels of 4 x 4: 5 parts of the 192 features, or 16, are no parts of the channels."""
    graph = block_graph(convolutions(64, 4, 3, 12))
    for procs, parts in ((5, {1}), (6, {1, 2, 3, 6}), (16, {1, 2, 4})):
        _, fc = all_strategies(graph, procs, 64, "linear")
        assert set(fc.inputs) == parts


def test_blocks_alike_share_their_strategies() -> None:
    graph = block_graph(known_net("resnet50"))
    ways = all_strategies(graph, 8, 8, "all")
    assert len({id(each) for each in ways}) < len(ways) / 2
    assert all(prod(each.space.shape) >= 0 for each in ways)
