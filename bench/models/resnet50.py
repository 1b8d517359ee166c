"""ResNet-50, as published (arXiv 1512.03385, table 1): bottlenecks of 3, 4, 6 and 3."""

from __future__ import annotations

import torch
from torch import nn

IMAGE_SIDE = 224


class Bottleneck(nn.Module):
    """Three convolutions to four times the width, with a shortcut beside them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(
            *conv(before, width, 1),
            nn.ReLU(inplace=True),
            *conv(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *conv(width, after, 1),
        )
        has_shape = before == after and stride == 1
        self.shortcut = (
            nn.Identity() if has_shape else nn.Sequential(*conv(before, after, 1, stride))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def conv(before: int, after: int, side: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution without a bias, and the norm behind it."""
    return (
        nn.Conv2d(before, after, side, stride, padding=side // 2, bias=False),
        nn.BatchNorm2d(after),
    )


def make_resnet50() -> nn.Module:
    """Images of 224 x 224 to 1,000 classes."""
    layers = [*conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    before = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(depth):
            stride = 2 if number == 0 and width > 64 else 1
            layers.append(Bottleneck(before, width, stride))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))
