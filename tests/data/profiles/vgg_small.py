"""A small VGG: activations shrink and weights grow from layer to layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

CHANNELS = (16, 32, 64, 64)


def make_model() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for channels in CHANNELS:
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = channels
    layers += [nn.Flatten(), nn.Linear(4 * before, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers)


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(16, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (16,), generator=generator)


loss_fn = functional.cross_entropy
