"""A small model, optimizers for it, and its training, for tests of optimizers that are away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.tier import MemoryTier

Maker = Callable[[Any], optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "adamw": lambda p: optim.AdamW(p, lr=1e-2),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: optim.SGD(p, lr=0.1, maximize=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2),
    "adadelta": optim.Adadelta,
    "adamax": optim.Adamax,
    "asgd": optim.ASGD,
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "rprop": optim.Rprop,
}
ADAMW = OPTIMIZERS["adamw"]


def model_of(width: int = 24, depth: int = 3) -> nn.Sequential:
    """Linear layers, and a weight that takes part in no loss."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    model.unused = nn.Parameter(torch.randn(width, width))
    return model


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    width = model[0].in_features
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, width, generator=generator)
    for module in list(model.children()):
        x = module(x)
    return x.pow(2).mean()


def swapped(optimizer: optim.Optimizer, **options: Any) -> SwappedOptimizer:
    return SwappedOptimizer(optimizer, **{"tier": MemoryTier(1 << 26), **options})


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(one: Any, other: Any) -> None:
    """Compare state dicts, to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    steps: range = range(4),
    clip: float | None = None,
    num_batches: int = 1,
) -> None:
    """Steps with PyTorch's own clipping, or none, after so many backwards each."""
    for step in steps:
        for batch in range(num_batches):
            loss_of(model, 10 * step + batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def saved(whole: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it would come back from a file."""
    return copy.deepcopy(whole)
