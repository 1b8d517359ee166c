"""Built-in networks, as their shapes: AlexNet, VGG-16, ResNet-50 and a 3-D U-Net.

They have every layer that a traced model has, so a planner treats both alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from elbowroom.core.errors import InputError, shown
from elbowroom.core.layer_shapes import Kind, LayerShape, ModelShapes
from elbowroom.core.windows import TransposedWindow, Window


def known_net(name: str) -> ModelShapes:
    """A built-in network's shapes for one sample. Raises InputError for another name."""
    if name not in _NETS:
        raise InputError(f"{shown(name)} is no built-in network: give one of {', '.join(_NETS)}")
    return _NETS[name]()


class _Net:
    """Layers as they are added; each method returns the new layer's name."""

    def __init__(self, *input_shape: int) -> None:
        self._layers: dict[str, LayerShape] = {}
        self._add(LayerShape("input", "input", (), (1, *input_shape)))

    def shapes(self, result: str) -> ModelShapes:
        return ModelShapes(tuple(self._layers.values()), (result,), batch=1)

    def conv(
        self,
        name: str,
        source: str,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> str:
        """A convolution, as wide in all dimensions; without ``padding`` half its kernel's."""
        padding = kernel // 2 if padding is None else padding
        _, depth, *sizes = self._layers[source].shape
        windows = (Window(kernel, stride, padding, padding),) * len(sizes)
        shape = _windowed(windows, channels, sizes)
        weights = depth * channels * kernel ** len(sizes)
        return self._add(
            LayerShape(
                name,
                "conv",
                (source,),
                shape,
                windows=windows,
                weights=weights,
                biases=channels if bias else 0,
                flops=2.0 * weights * math.prod(shape[2:]),
            )
        )

    def up_conv(self, name: str, source: str) -> str:
        """A transposed convolution that doubles all sizes and keeps the channels."""
        _, channels, *sizes = self._layers[source].shape
        weights = channels * channels * 2 ** len(sizes)
        return self._add(
            LayerShape(
                name,
                "conv_transpose",
                (source,),
                (1, channels, *(2 * size for size in sizes)),
                windows=(TransposedWindow(2, stride=2),) * len(sizes),
                weights=weights,
                biases=channels,
                flops=2.0 * weights * math.prod(sizes),
            )
        )

    def linear(self, name: str, source: str, features: int) -> str:
        depth = self._layers[source].shape[-1]
        weights = depth * features
        return self._add(
            LayerShape(
                name,
                "linear",
                (source,),
                (1, features),
                weights=weights,
                biases=features,
                flops=2.0 * weights,
            )
        )

    def max_pool(self, name: str, source: str, kernel: int, stride: int, padding: int = 0) -> str:
        _, channels, *sizes = self._layers[source].shape
        windows = (Window(kernel, stride, padding, padding),) * len(sizes)
        shape = _windowed(windows, channels, sizes)
        return self._add(LayerShape(name, "max_pool", (source,), shape, windows=windows))

    def batch_norm(self, name: str, source: str) -> str:
        channels = self._layers[source].shape[1]
        return self._like(name, "batch_norm", source, biases=2 * channels)

    def relu(self, name: str, source: str) -> str:
        return self._like(name, "pointwise", source)

    def dropout(self, name: str, source: str) -> str:
        return self._like(name, "dropout", source)

    def add(self, name: str, *sources: str) -> str:
        return self._add(LayerShape(name, "elementwise", sources, self._layers[sources[0]].shape))

    def cat(self, name: str, *sources: str) -> str:
        channels = sum(self._layers[source].shape[1] for source in sources)
        _, _, *sizes = self._layers[sources[0]].shape
        return self._add(LayerShape(name, "cat", sources, (1, channels, *sizes)))

    def global_pool(self, name: str, source: str) -> str:
        _, channels, *sizes = self._layers[source].shape
        shape = (1, channels, *(1 for _ in sizes))
        return self._add(LayerShape(name, "global_pool", (source,), shape))

    def flatten(self, name: str, source: str) -> str:
        features = self._layers[source].num_elements
        return self._add(LayerShape(name, "reshape", (source,), (1, features)))

    def _like(self, name: str, kind: Kind, source: str, biases: int = 0) -> str:
        shape = self._layers[source].shape
        return self._add(LayerShape(name, kind, (source,), shape, biases=biases))

    def _add(self, layer: LayerShape) -> str:
        self._layers[layer.name] = layer
        return layer.name


def _windowed(windows: tuple[Window, ...], channels: int, sizes: list[int]) -> tuple[int, ...]:
    outputs = (window.num_outputs(size) for window, size in zip(windows, sizes, strict=True))
    return (1, channels, *outputs)


def _alexnet() -> ModelShapes:
    """AlexNet on one device: no groups, 227 x 227 pixels, 62.4 million weights."""
    net = _Net(3, 227, 227)
    last = net.relu("relu1", net.conv("conv1", "input", 96, 11, stride=4, padding=0))
    last = net.max_pool("pool1", last, 3, 2)
    last = net.relu("relu2", net.conv("conv2", last, 256, 5))
    last = net.max_pool("pool2", last, 3, 2)
    last = net.relu("relu3", net.conv("conv3", last, 384, 3))
    last = net.relu("relu4", net.conv("conv4", last, 384, 3))
    last = net.relu("relu5", net.conv("conv5", last, 256, 3))
    last = net.max_pool("pool5", last, 3, 2)
    return net.shapes(_classifier(net, last))


def _vgg16() -> ModelShapes:
    """VGG-16, configuration D, without norms: 138.4 million weights."""
    net = _Net(3, 224, 224)
    last = "input"
    for stage, (channels, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
        for index in range(1, depth + 1):
            conv = net.conv(f"conv{stage}_{index}", last, channels, 3)
            last = net.relu(f"relu{stage}_{index}", conv)
        last = net.max_pool(f"pool{stage}", last, 2, 2)
    return net.shapes(_classifier(net, last))


def _classifier(net: _Net, last: str) -> str:
    """The three linear layers of AlexNet and VGG."""
    last = net.flatten("flatten", last)
    for name in ("6", "7"):
        last = net.relu(f"relu{name}", net.linear(f"fc{name}", last, 4096))
        last = net.dropout(f"dropout{name}", last)
    return net.linear("fc8", last, 1000)


def _resnet50() -> ModelShapes:
    """ResNet-50 with the stride in the 3 x 3 convolutions: 25.6 million weights."""
    net = _Net(3, 224, 224)
    last = net.batch_norm("bn1", net.conv("conv1", "input", 64, 7, stride=2, bias=False))
    last = net.max_pool("pool1", net.relu("relu1", last), 3, 2, 1)
    for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for index in range(depth):
            stride = 2 if stage > 1 and index == 0 else 1
            last = _bottleneck(net, f"layer{stage}.{index}", last, width, stride, index == 0)
    last = net.flatten("flatten", net.global_pool("avgpool", last))
    return net.shapes(net.linear("fc", last, 1000))


def _bottleneck(net: _Net, name: str, source: str, width: int, stride: int, projects: bool) -> str:
    def normed(part: str, source: str, channels: int, kernel: int, stride: int = 1) -> str:
        conv = net.conv(f"{name}.conv{part}", source, channels, kernel, stride=stride, bias=False)
        return net.batch_norm(f"{name}.bn{part}", conv)

    last = net.relu(f"{name}.relu1", normed("1", source, width, 1))
    last = net.relu(f"{name}.relu2", normed("2", last, width, 3, stride))
    last = normed("3", last, 4 * width, 1)
    shortcut = normed("_shortcut", source, 4 * width, 1, stride) if projects else source
    return net.relu(f"{name}.relu3", net.add(f"{name}.add", last, shortcut))


def _unet3d() -> ModelShapes:
    """The 3-D U-Net of Cicek et al. (2016), padded so that sizes stay: 128^3 voxels, 3 classes."""
    net = _Net(1, 128, 128, 128)
    last = _unet_level(net, 0, "input")
    return net.shapes(net.conv("out", last, 3, 1))


def _unet_level(net: _Net, level: int, source: str) -> str:
    """Two convolutions down, the levels below, and two up."""

    def normed(name: str, source: str, channels: int) -> str:
        conv = net.conv(f"{name}.conv", source, channels, 3, bias=False)
        return net.relu(f"{name}.relu", net.batch_norm(f"{name}.bn", conv))

    wide = 64 * 2**level
    last = normed(f"down{level}.2", normed(f"down{level}.1", source, wide // 2), wide)
    if level == 3:
        return last
    below = _unet_level(net, level + 1, net.max_pool(f"pool{level}", last, 2, 2))
    joined = net.cat(f"cat{level}", net.up_conv(f"upconv{level}", below), last)
    return normed(f"up{level}.2", normed(f"up{level}.1", joined, wide), wide)


_NETS: dict[str, Callable[[], ModelShapes]] = {
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "resnet50": _resnet50,
    "unet3d": _unet3d,
}
KNOWN_NETS = tuple(_NETS)
"""Names of the built-in networks."""
