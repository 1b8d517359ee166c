"""VGG-16 (arXiv 1409.1556) for images of 32 x 32: a training script for ``bench.peers``."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLED = (1, 3, 6, 9, 12)
HIDDEN, NUM_CLASSES, SIDE = 4096, 1000, 32
ROWS = 32

HAND_MADE_CUT = "conv8"
"""Where one would split by hand: half of the 16 layers with weights before it, half behind."""

make_optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def make_model() -> nn.Module:
    """Images [rows, 3, 32, 32] -> logits [rows, 1000]; each child is a layer with weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    before = 3
    for number, channels in enumerate(CHANNELS):
        parts = [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
        if number in POOLED:
            parts.append(nn.MaxPool2d(2))
        layers[f"conv{number}"] = nn.Sequential(*parts)
        before = channels
    layers["fc0"] = nn.Sequential(nn.Flatten(), nn.Linear(before, HIDDEN), nn.ReLU())
    layers["fc1"] = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
    layers["fc2"] = nn.Linear(HIDDEN, NUM_CLASSES)
    return nn.Sequential(layers)


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: only the time counts."""
    images = torch.randn(ROWS, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(NUM_CLASSES, (ROWS,), generator=generator)


loss_fn = functional.cross_entropy
