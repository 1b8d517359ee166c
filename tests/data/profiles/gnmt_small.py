"""A small GNMT without attention: layers of LSTMs between two large tables."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WORDS, WIDTH = 2000, 64


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lstm(x)[0]


def make_model() -> nn.Module:
    between = [Recurrent() for _ in range(4)]
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), *between, nn.Linear(WIDTH, WORDS))


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(WORDS, (8, 12), generator=generator)
    return words, words


def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
