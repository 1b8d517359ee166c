"""Two convolutions before linear layers with nearly all weights, for ``bench.grid_peers``."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional

CHANNELS = (32, 64)
HIDDEN, NUM_CLASSES, SIDE = 1024, 512, 16
ROWS = 64

make_optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def make_model() -> nn.Module:
    """Images [rows, 3, 16, 16] -> logits [rows, 512]; 2.6 million weights, 99 % of them linear."""
    narrow, wide = CHANNELS
    layers = OrderedDict(
        conv0=nn.Conv2d(3, narrow, 3, padding=1),
        relu0=nn.ReLU(),
        pool0=nn.MaxPool2d(2),
        conv1=nn.Conv2d(narrow, wide, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc0=nn.Linear(wide * (SIDE // 4) ** 2, HIDDEN),
        relu2=nn.ReLU(),
        fc1=nn.Linear(HIDDEN, HIDDEN),
        relu3=nn.ReLU(),
        fc2=nn.Linear(HIDDEN, NUM_CLASSES),
    )
    return nn.Sequential(layers)


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: only the time counts."""
    images = torch.randn(ROWS, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(NUM_CLASSES, (ROWS,), generator=generator)


loss_fn = functional.cross_entropy
