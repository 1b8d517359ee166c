"""Small models that save tensors in different ways, each with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class ConvBlock(nn.Module):
    """Convolution, batch norm and ReLU in place, with a shortcut where widths agree."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm(self.conv(x)))
        return y + x if y.shape == x.shape else y


class UNet3d(nn.Module):
    """Two levels of 3-D convolutions, with a skip and upsampling."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down = self._block(1, width)
        self.bottom = self._block(width, 2 * width)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.top = self._block(2 * width, width)
        self.head = nn.Conv3d(width, 2, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(before, after, 3, padding=1), nn.BatchNorm3d(after), nn.ReLU(inplace=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.down(x)
        below = self.bottom(F.max_pool3d(left, 2))
        return self.head(self.top(torch.cat([left, self.up(below)], dim=1)))


class LastOfLstm(nn.Module):
    """Two LSTM layers with a classifier on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """Blocks of attention and feed-forward, both with dropout, on embedded tokens."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A model with a batch; ``loss`` runs the forward, with random numbers that are always same."""

    model: nn.Module
    inputs: torch.Tensor
    targets: torch.Tensor

    def loss(self) -> torch.Tensor:
        torch.manual_seed(7)
        return F.cross_entropy(self.model(self.inputs), self.targets)

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


def cnn() -> Case:
    blocks = [ConvBlock(3, 8), ConvBlock(8, 8), ConvBlock(8, 16), ConvBlock(16, 16)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return Case(nn.Sequential(*blocks, *head), torch.randn(4, 3, 16, 16), torch.arange(4) % 4)


def unet() -> Case:
    return Case(UNet3d(), torch.randn(2, 1, 8, 8, 8), torch.randint(2, (2, 8, 8, 8)))


def lstm() -> Case:
    return Case(LastOfLstm(), torch.randn(8, 12, 16), torch.arange(8) % 4)


def transformer() -> Case:
    return Case(Transformer(), torch.randint(50, (4, 16)), torch.randint(50, (4, 16)))


MAKERS: dict[str, Callable[[], Case]] = {
    "cnn": cnn,
    "unet": unet,
    "lstm": lstm,
    "transformer": transformer,
}


def make(name: str) -> Case:
    """A case whose weights and batch depend on nothing but its name."""
    torch.manual_seed(3)
    return MAKERS[name]()
