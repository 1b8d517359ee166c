"""Decoder layers in plain torch, for benchmarks of the pool without an engine around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Pack = Callable[[torch.Tensor], torch.Tensor]
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Shape(NamedTuple):
    """Decoder layer with a gated feed-forward network; a row attends to ``context`` tokens."""

    hidden: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int

    @property
    def kv_bytes_per_row(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.context * 2

    @property
    def attention_bytes(self) -> int:
        return 2 * self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def ffn_bytes(self) -> int:
        return 3 * self.hidden * self.width * 2


class PackedLinear(nn.Module):
    """A matrix [out, in] in the form of ``linear``, once the block has packed it."""

    def __init__(self, num_out: int, num_in: int, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        weight = torch.empty(num_out, num_in, dtype=torch.bfloat16).normal_(std=num_in**-0.5)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, self.weight)


class Mlp(nn.Module):
    """Gated, the down projection in halves as the engine packs it."""

    def __init__(self, shape: Shape, linear: Linear) -> None:
        super().__init__()
        self.width = shape.width
        self.gate_and_up = PackedLinear(2 * shape.width, shape.hidden, linear)
        self.down = nn.ModuleList(
            PackedLinear(shape.hidden, shape.width // 2, linear) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_and_up = self.gate_and_up(x)
        inner = functional.silu(gate_and_up[:, : self.width]) * gate_and_up[:, self.width :]
        halves = inner.chunk(2, dim=1)
        out: torch.Tensor = self.down[0](halves[0]) + self.down[1](halves[1])
        return out


class Block(nn.Module):
    """A decoder layer. ``kv`` are keys and values [rows, KV heads, context, head size] each."""

    def __init__(self, shape: Shape, linear: Linear, pack: Pack, kv: KeysAndValues) -> None:
        super().__init__()
        self.shape = shape
        heads = shape.num_heads * shape.head_dim
        self.qkv = PackedLinear(
            heads + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden, linear
        )
        self.out = PackedLinear(shape.hidden, heads, linear)
        self.kv = kv
        self.mlp = Mlp(shape, linear)
        for one in self.modules():
            if isinstance(one, PackedLinear):
                one.weight.copy_(pack(one.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(functional.rms_norm(x, x.shape[1:]))
        out: torch.Tensor = x + self.mlp(functional.rms_norm(x, x.shape[1:]))
        return out

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """The queries that share a head of keys stand below each other in one small product."""
        rows, heads = len(x), self.shape.num_heads * self.shape.head_dim
        queries = self.qkv(x)[:, :heads].view(
            rows, self.shape.num_kv_heads, -1, self.shape.head_dim
        )
        keys, values = (cache[:rows] for cache in self.kv)
        scores = (queries @ keys.transpose(-1, -2)).float().div(self.shape.head_dim**0.5)
        out: torch.Tensor = self.out((scores.softmax(-1).to(x.dtype) @ values).view(rows, heads))
        return out
