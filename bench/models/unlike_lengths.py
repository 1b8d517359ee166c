"""A GPT of 4 blocks and rows of unlike length: for ``bench.balanced_microbatches``.

Lengths are lognormal, as those of many corpora are nearly.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from elbowroom import Microbatch, balanced_microbatches
from elbowroom.planning.microbatches import Method

WIDTH, NUM_BLOCKS, HEADS, VOCABULARY = 256, 4, 4, 512
ROWS, MEDIAN, SIGMA, SHORTEST, LONGEST = 64, 100, 0.8, 8, 1024
NONE = -100

make_optimizer = partial(torch.optim.SGD, lr=1e-3)

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """[rows, length, WIDTH], and gives the same; causal, normalised before each part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Embedding(nn.Module):
    """Token ids [rows, length] -> [rows, length, WIDTH], with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LONGEST, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(x) + self.positions[: x.size(1)]


def make_model() -> nn.Module:
    """Token ids [rows, length] -> logits [rows, length, VOCABULARY]; each child is a layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Embedding())
    for number in range(NUM_BLOCKS):
        layers[f"block{number}"] = Block()
    layers["norm"] = nn.LayerNorm(WIDTH)
    layers["head"] = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(layers)


def make_batch(generator: torch.Generator) -> Batch:
    """Noise: only the time counts. Padded to the longest row."""
    drawn = torch.randn(ROWS, generator=generator).mul(SIGMA).exp().mul(MEDIAN)
    lengths = drawn.long().clamp(SHORTEST, LONGEST)
    shape = (ROWS, int(lengths.max()))
    padding = torch.arange(shape[1]) >= lengths[:, None]
    ids, targets = (torch.randint(VOCABULARY, shape, generator=generator) for _ in range(2))
    return ids, targets.masked_fill(padding, NONE)


def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NONE)


def lengths_of(targets: torch.Tensor) -> list[int]:
    """Tokens of each row, without padding."""
    lengths: list[int] = (targets != NONE).sum(dim=1).tolist()
    return lengths


def cut(batch: Batch, count: int, method: Method, crossover: float) -> list[Microbatch]:
    """Microbatches that are each padded to their own longest row."""
    (ids, targets), parts = batch, []
    lengths = lengths_of(targets)
    for rows in balanced_microbatches(lengths, count, crossover=crossover, method=method):
        longest, num_tokens = max(lengths[k] for k in rows), sum(lengths[k] for k in rows)
        parts.append(Microbatch(ids[rows, :longest], targets[rows, :longest], num_tokens))
    return parts
