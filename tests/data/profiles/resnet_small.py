"""A small ResNet: what a block reads is added to what it answers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


def make_model() -> nn.Module:
    blocks = [Block(16) for _ in range(4)]
    begin, end = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 16 * 16, 10)
    return nn.Sequential(begin, nn.MaxPool2d(2), *blocks, nn.Flatten(), end)


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(16, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (16,), generator=generator)


loss_fn = functional.cross_entropy
