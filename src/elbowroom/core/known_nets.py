"""Built-in networks, as their shapes: AlexNet, VGG-16, ResNet-50 and a 3-D U-Net."""

from __future__ import annotations

from elbowroom.core.layer_shapes import ModelShapes

KNOWN_NETS = ("alexnet", "vgg16", "resnet50", "unet3d")


def known_net(name: str) -> ModelShapes:
    """A built-in network's shapes for one sample. Raises InputError for another name."""
    raise NotImplementedError(name)
