"""Small models for tests, each with a batch, and plans made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from elbowroom.plans.pipeline import (
    DataParallel,
    Level,
    LevelTraffic,
    PipelineOptions,
    PipelinePlan,
    StagePlan,
)


class Residual(nn.Module):
    """Two convolutions and the way around them, as in a ResNet, written in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8 * 6 * 6, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(image))
        return self.head(x.flatten(1))


class Block(nn.Module):
    """Attention and a feed-forward network, written out with sizes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        shape = (rows, tokens, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(rows, tokens, width)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))


class TinyLM(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.places = nn.Parameter(torch.randn(16, 32))
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.tokens(ids) + scale * self.places[: ids.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Skips(nn.Module):
    """What the first layer gives, and an input, are read far behind; three outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        first = middle = self.layers[0](x).tanh()
        for layer in list(self.layers)[1:4]:
            middle = layer(middle).tanh()
        out, (hidden, _) = self.lstm(middle + first)
        last = self.layers[5](self.layers[4](out) * first + first)
        return {"last": last * weight, "hidden": hidden, "first": first}


class Looks(nn.Module):
    """Looks at its input's size with Python's ``if``, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bn = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x) if x.size(1) == 6 else self.two(x)
        with torch.no_grad():
            scale = x.abs().mean()
        return self.two(self.bn(x) / scale)


class Counter(nn.Module):
    """Counts its calls, before its first layer and behind its last one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("begun", torch.zeros(()))
        self.register_buffer("ended", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begun.add_(1)
        x = self.two(self.one(x).relu()).tanh()
        self.ended.add_(1)
        return x


class Pair(nn.Module):
    """Gives two tensors to the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.sum() > 0:  # no tracer can follow that
            return self.linear(x), x
        return x, self.linear(x)


class Joined(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] * pair[1]


class Case(NamedTuple):
    model: nn.Module
    inputs: object


def mlp() -> Case:
    layers = [layer for _ in range(3) for layer in (nn.Linear(12, 12), nn.ReLU(), nn.Dropout(0.2))]
    return Case(nn.Sequential(*layers, nn.Linear(12, 5)), torch.randn(7, 12))


def conv_net() -> Case:
    return Case(ConvNet(), torch.randn(4, 3, 8, 8))


def tiny_lm() -> Case:
    return Case(TinyLM(), torch.randint(0, 50, (3, 10)))


def skips() -> Case:
    return Case(Skips(), {"weight": torch.randn(6), "x": torch.randn(3, 4, 6)})


def looks() -> Case:
    return Case(Looks(), torch.randn(5, 6))


def counter() -> Case:
    return Case(Counter(), torch.randn(5, 6))


def blocks() -> Case:
    return Case(
        nn.Sequential(Pair(), Joined(), nn.Dropout(0.3), Pair(), Joined()), torch.rand(5, 6)
    )


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case for case in (mlp, conv_net, tiny_lm, skips, looks, counter, blocks)
}


def plan_of(stages: Sequence[Sequence[str]], replicas: Sequence[int] | None = None) -> PipelinePlan:
    """A plan of these layers, straight if no replicas are given, with no numbers in it."""
    counts = replicas or [1] * len(stages)
    made = [
        StagePlan(tuple(names), (count,), count, 0.0, 0.0, 1, 0, 0, 0, 0, 0)
        for names, count in zip(stages, counts, strict=True)
    ]
    return PipelinePlan(
        stages=tuple(made),
        levels=(Level(sum(counts), 1e9),),
        options=PipelineOptions(),
        seconds=0.0,
        traffic=(LevelTraffic("link", 0, 0),),
        data_parallel=DataParallel(0.0, 0),
        num_cuts=0,
        is_exact=True,
    )


def evenly(names: Sequence[str], num_stages: int) -> PipelinePlan:
    """Equally many layers in each stage."""
    bounds = [len(names) * k // num_stages for k in range(num_stages + 1)]
    return plan_of([names[bounds[k] : bounds[k + 1]] for k in range(num_stages)])
