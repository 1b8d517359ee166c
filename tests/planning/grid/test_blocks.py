"""A model's blocks: what has a layout of its own, what follows it, and what moves between."""

from elbowroom.core.known_nets import known_net
from elbowroom.planning.grid.blocks import BlockGraph, block_graph
from tests.planning.grid.models import Shapes, convolutions, perceptron, residual


def edges(graph: BlockGraph) -> set[tuple[str, str, str]]:
    names = [block.name for block in graph.blocks]
    return {(names[edge.source], names[edge.target], edge.layer.name) for edge in graph.edges}


def test_a_chain_has_a_block_for_each_layer_with_weights() -> None:
    graph = block_graph(convolutions(4, 8, 3, 8, 8))
    assert [block.name for block in graph.blocks] == ["conv0", "conv1", "fc"]
    assert [block.follower_names for block in graph.blocks] == [
        ("relu0",),
        ("relu1", "flatten"),
        (),
    ]
    assert [block.is_first for block in graph.blocks] == [True, False, False]
    assert edges(graph) == {("conv0", "conv1", "relu0"), ("conv1", "fc", "flatten")}
    assert graph.is_chain


def test_a_fork_and_a_join_are_blocks_of_their_own() -> None:
    graph = block_graph(residual(4))
    assert [block.kind for block in graph.blocks] == [
        "weighted",
        "plain",
        "weighted",
        "plain",
        "weighted",
    ]
    assert edges(graph) == {
        ("stem", "stem.relu", "stem"),
        ("stem.relu", "branch", "stem.relu"),
        ("branch", "add", "bn"),
        ("stem.relu", "add", "stem.relu"),
        ("add", "fc", "flatten"),
    }
    assert not graph.is_chain
    assert [edge.is_pooled for edge in graph.edges] == [False, False, False, False, True]


def test_known_graphs_have_their_joins() -> None:
    resnet = block_graph(known_net("resnet50"))
    assert len(resnet.blocks) == 54 + 1 + 16  # layers with weights, the stem's fork, additions
    unet = block_graph(known_net("unet3d"))
    assert len(unet.blocks) == 18 + 3 + 3  # layers with weights, forks, joins
    pools = [block for block in unet.blocks if "pool0" in block.follower_names]
    assert [block.name for block in pools] == ["down0.2.relu"]


def test_an_activation_times_its_input_is_no_join() -> None:
    net = Shapes(8, batch=4)
    first = net.linear("fc", "input", 8)
    half = net.like("half", "pointwise", first)
    gate = net.like("sigmoid", "pointwise", half)
    graph = block_graph(net.built(net.like("mul", "elementwise", half, gate)))
    assert [block.name for block in graph.blocks] == ["fc", "half"]
    assert graph.blocks[1].follower_names == ("sigmoid", "mul")
    assert [layer.name for layer in graph.blocks[1].results] == ["mul"]


def test_a_norm_over_features_has_a_layout_of_its_own() -> None:
    net = Shapes(6, 8, batch=4)
    norm = net.like("norm", "layer_norm", net.linear("fc", "input", 8), biases=16)
    graph = block_graph(net.built(net.linear("end", norm, 8)))
    assert [(block.name, block.kind) for block in graph.blocks] == [
        ("fc", "weighted"),
        ("norm", "plain"),
        ("end", "weighted"),
    ]


def test_what_depends_on_the_input_alone_moves_nothing() -> None:
    net = Shapes(8, batch=4)
    scaled = net.like("scale", "pointwise", "input")
    first = net.linear("fc", scaled, 8)
    graph = block_graph(net.built(net.like("masked", "elementwise", first, "input")))
    assert [block.name for block in graph.blocks] == ["fc"]
    assert graph.edges == ()


def test_a_layer_without_a_rule_stands_alone() -> None:
    net = Shapes(8, batch=4)
    odd = net.like("odd", "whole", net.linear("fc", "input", 8))
    graph = block_graph(net.built(net.linear("end", odd, 8)))
    assert [block.kind for block in graph.blocks] == ["weighted", "whole", "weighted"]


def test_a_perceptron_is_a_chain() -> None:
    assert block_graph(perceptron(4, 8, 8, 8, 8)).is_chain
