"""A GPT-2 (Radford et al. 2019) at a third of its width: a training script for ``bench.peers``.

The vocabulary is 64 times the width, as there (50,257 to 768), so the head is as heavy as five
blocks. Its weights are its own.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional

WIDTH, NUM_BLOCKS, HEADS, VOCABULARY = 256, 12, 4, 16_384
ROWS, LENGTH = 8, 64

HAND_MADE_CUT = "block6"
"""Where one would split by hand: half of the blocks before it, half behind."""

make_optimizer = partial(torch.optim.AdamW, lr=1e-3)


class Block(nn.Module):
    """[rows, length, WIDTH], and gives the same; causal, normalised before each part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, functional.gelu, batch_first=True, norm_first=True
        )
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, self.mask, is_causal=True)


class Embedding(nn.Module):
    """Token ids [rows, length] -> [rows, length, WIDTH], with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.positions


def make_model() -> nn.Module:
    """Token ids [rows, length] -> logits [rows, length, VOCABULARY]; each child is a layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Embedding())
    for number in range(NUM_BLOCKS):
        layers[f"block{number}"] = Block()
    layers["norm"] = nn.LayerNorm(WIDTH)
    layers["head"] = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(layers)


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: only the time counts."""
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
