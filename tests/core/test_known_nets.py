"""Built-in networks have the sizes that are published of them."""

import math

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.known_nets import KNOWN_NETS, known_net
from elbowroom.core.layer_shapes import LayerShape, ModelShapes
from elbowroom.core.windows import Window

PARAMETERS = {
    "alexnet": 62_378_344,  # without groups; torchvision's is another network
    "vgg16": 138_357_544,  # torchvision
    "resnet50": 25_557_032,  # torchvision
}
FORWARD_GFLOPS = {"alexnet": 2.27, "vgg16": 30.94, "resnet50": 8.18}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_net_has_as_many_parameters_as_its_authors_say(name: str) -> None:
    assert known_net(name).num_weights == PARAMETERS[name]


def test_the_unet_has_its_weights() -> None:
    """3 x 3 x 3 kernels between these channels, 2 x 2 x 2 ones upwards, 1 x 1 x 1 at the end."""
    down = [(1, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    up = [(768, 256), (256, 256), (384, 128), (128, 128), (192, 64), (64, 64)]
    kernels = 27 * sum(a * b for a, b in down + up) + 8 * sum(c * c for c in (512, 256, 128))
    layers = known_net("unet3d").layers
    assert sum(layer.weights for layer in layers) == kernels + 64 * 3


@pytest.mark.parametrize("name", FORWARD_GFLOPS)
def test_the_work_of_a_sample_is_right(name: str) -> None:
    flops = sum(layer.flops for layer in known_net(name).layers)
    assert flops / 1e9 == pytest.approx(FORWARD_GFLOPS[name], rel=0.01)


@pytest.mark.parametrize("name", KNOWN_NETS)
def test_windows_give_the_sizes_and_joins_the_channels(name: str) -> None:
    net = known_net(name)
    for layer in net.layers:
        sources = [net.by_name[source] for source in layer.sources]
        if layer.windows:
            before = zip(layer.windows, sources[0].space_sizes, strict=True)
            assert tuple(window.num_outputs(n) for window, n in before) == layer.space_sizes
        if layer.kind == "cat":
            assert layer.num_features == sum(source.num_features for source in sources)
        if layer.kind in ("elementwise", "batch_norm", "pointwise"):
            assert all(source.shape == layer.shape for source in sources)
        if layer.kind in ("conv", "linear"):
            assert layer.weights == _weights(layer, sources[0])
            assert layer.flops == 2 * layer.weights * math.prod(layer.space_sizes)


def _weights(layer: LayerShape, source: LayerShape) -> int:
    kernels = [window.kernel for window in layer.windows if isinstance(window, Window)]
    return source.num_features * layer.num_features * math.prod(kernels)


@pytest.mark.parametrize("name", KNOWN_NETS)
def test_shapes_survive_their_file_and_another_batch(name: str) -> None:
    net = known_net(name)
    assert ModelShapes.from_json(net.to_json()) == net
    many = net.for_batch(8)
    assert many.layers[1].num_elements == 8 * net.layers[1].num_elements
    assert sum(layer.flops for layer in many.layers) == 8 * sum(x.flops for x in net.layers)
    assert many.num_weights == net.num_weights


def test_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError) as refused:
        known_net("lenet")
    assert all(name in str(refused.value) for name in KNOWN_NETS)
