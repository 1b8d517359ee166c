"""Models whose memory is measured: heavy in weights, in activations, in both, and uneven."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from elbowroom.plans.pipeline import Optimizer, Semantics
from tests.pipeline.models import Block


@dataclass(frozen=True)
class Case:
    model: str
    replicas: tuple[int, ...]
    optimizer: Optimizer
    semantics: Semantics = "stash"
    microbatches: int = 1
    depth: int = 1
    swaps: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        fields = json.loads(text)
        return Case(**{**fields, "replicas": tuple(fields["replicas"])})


class Model(NamedTuple):
    model: nn.Module
    make_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    loss_fn: Callable[[Any, Any], torch.Tensor]


def mlp() -> Model:
    """Weights of 4 MiB a layer, activations of 0.1."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return Model(
        nn.Sequential(*layers),
        lambda: (torch.randn(32, 1024), torch.randint(0, 1024, (32,))),
        functional.cross_entropy,
    )


def conv() -> Model:
    """Large activations in front, most weights behind, as in VGG; written in place."""
    widths = (3, 16, 16, 32, 32, 64, 64)
    layers: list[nn.Module] = []
    for number, (before, width) in enumerate(pairwise(widths)):
        conv = nn.Conv2d(before, width, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if number % 2 else []
    layers += [nn.Flatten(), nn.Linear(64 * 8 * 8, 256), nn.ReLU(), nn.Linear(256, 10)]
    return Model(
        nn.Sequential(*layers),
        lambda: (torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))),
        functional.cross_entropy,
    )


def blocks() -> Model:
    """Transformer blocks: weights and activations."""
    layers = [nn.Embedding(256, 128), *(Block(128, 4) for _ in range(6)), nn.Linear(128, 256)]
    return Model(
        nn.Sequential(*layers),
        lambda: (torch.randint(0, 256, (8, 64)), torch.randint(0, 256, (8, 64))),
        _of_tokens,
    )


MODELS: dict[str, Callable[[], Model]] = {made.__name__: made for made in (mlp, conv, blocks)}

_OPTIMIZERS: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


def make_optimizer(case: Case) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return _OPTIMIZERS[case.optimizer]


def _of_tokens(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
