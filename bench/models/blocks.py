"""A small GPT and a small CNN whose blocks can be run in other ways, as under checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

Batch = tuple[torch.Tensor, torch.Tensor]
Around = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Runs a block on its input."""


def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


class Residual(nn.Module):
    """Two convolutions with norms, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU(inplace=True))
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Blocks(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: torch.Tensor, around: Around = call) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = around(block, x)
        return self.head(x)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def gpt(width: int = 128, depth: int = 4, rows: int = 8, length: int = 128) -> tuple[Blocks, Batch]:
    """Blocks of attention of 4 heads and feed-forward, with dropout; 256 tokens."""
    blocks = [
        nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    model = Blocks(nn.Embedding(256, width), list(blocks), nn.Linear(width, 256))
    tokens = torch.randint(256, (rows, length + 1))
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def cnn(width: int = 32, depth: int = 6, rows: int = 8, side: int = 64) -> tuple[Blocks, Batch]:
    """Residual blocks of two convolutions; 10 classes."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    stem = nn.Conv2d(3, width, 3, padding=1)
    model = Blocks(stem, [Residual(width) for _ in range(depth)], head)
    return model, (torch.randn(rows, 3, side, side), torch.randint(10, (rows,)))
