"""Small models as shapes, for tests of grids: chains, residual blocks, tangled graphs."""

from __future__ import annotations

from collections.abc import Sequence

from elbowroom.core.layer_shapes import Kind, LayerShape, ModelShapes
from elbowroom.core.windows import Window


class Shapes:
    """Layers as they are added; each method returns the new layer's name."""

    def __init__(self, *input_shape: int, batch: int) -> None:
        self._batch = batch
        self._layers: dict[str, LayerShape] = {}
        self._add(LayerShape("input", "input", (), (batch, *input_shape)))

    def built(self, *results: str) -> ModelShapes:
        return ModelShapes(tuple(self._layers.values()), results, self._batch)

    def conv(self, name: str, source: str, channels: int, kernel: int = 3) -> str:
        _, depth, *sizes = self._layers[source].shape
        window = Window(kernel, 1, kernel // 2, kernel // 2)
        shape = (self._batch, channels, *sizes)
        weights = depth * channels * kernel ** len(sizes)
        windows = (window,) * len(sizes)
        flops = 2.0 * weights * self._layers[source].num_elements / depth
        return self._add(
            LayerShape(
                name, "conv", (source,), shape, windows=windows, weights=weights, flops=flops
            )
        )

    def linear(self, name: str, source: str, features: int) -> str:
        *others, depth = self._layers[source].shape
        shape = (*others, features)
        weights = depth * features
        flops = 2.0 * weights * self._layers[source].num_elements / depth
        return self._add(
            LayerShape(
                name, "linear", (source,), shape, len(shape) - 1, weights=weights, flops=flops
            )
        )

    def like(self, name: str, kind: Kind, *sources: str, biases: int = 0, groups: int = 1) -> str:
        """A layer whose output is as its first source's."""
        first = self._layers[sources[0]]
        return self._add(
            LayerShape(
                name, kind, sources, first.shape, first.features, biases=biases, groups=groups
            )
        )

    def of_shape(self, name: str, kind: Kind, source: str, shape: Sequence[int]) -> str:
        return self._add(LayerShape(name, kind, (source,), (self._batch, *shape)))

    def _add(self, layer: LayerShape) -> str:
        self._layers[layer.name] = layer
        return layer.name


def perceptron(batch: int, *features: int) -> ModelShapes:
    """Linear layers with an activation behind each but the last."""
    net = Shapes(features[0], batch=batch)
    last = "input"
    for index, width in enumerate(features[1:]):
        last = net.linear(f"fc{index}", last, width)
        if index < len(features) - 2:
            last = net.like(f"relu{index}", "pointwise", last)
    return net.built(last)


def convolutions(batch: int, size: int, *channels: int) -> ModelShapes:
    """3 x 3 convolutions, and a linear layer of 10 classes behind them."""
    net = Shapes(channels[0], size, size, batch=batch)
    last = "input"
    for index, depth in enumerate(channels[1:]):
        last = net.like(f"relu{index}", "pointwise", net.conv(f"conv{index}", last, depth))
    last = net.of_shape("flatten", "reshape", last, (channels[-1] * size * size,))
    return net.built(net.linear("fc", last, 10))


def residual(batch: int, size: int = 8, width: int = 16, channels: int = 3) -> ModelShapes:
    """A stem, one residual block, and a classifier: five layers that need a layout."""
    net = Shapes(channels, size, size, batch=batch)
    stem = net.like("stem.relu", "pointwise", net.conv("stem", "input", width))
    branch = net.like("bn", "batch_norm", net.conv("branch", stem, width), biases=2 * width)
    added = net.like("add", "elementwise", branch, stem)
    pooled = net.of_shape("pool", "global_pool", added, (width, 1, 1))
    flat = net.of_shape("flatten", "reshape", pooled, (width,))
    return net.built(net.linear("fc", flat, 10))


def tangled(batch: int, width: int = 12) -> ModelShapes:
    """Five layers of which each reads all before: no series-parallel graph."""
    net = Shapes(width, batch=batch)
    outputs = [net.like("relu", "pointwise", net.linear("fc", "input", width))]
    for index in range(4):
        joined = outputs[0]
        if index:
            joined = net.like(f"add{index}", "elementwise", *outputs)
        layer = net.linear(f"fc{index}", joined, width)
        outputs.append(net.like(f"relu{index}", "pointwise", layer))
    return net.built(net.like("end", "elementwise", *outputs))
