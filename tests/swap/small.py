"""One small tensor and steps of it, for tests of what hooks may meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elbowroom.plans.swap import PlannedStorage, Swapped, SwapPlan, default_order
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link

SIZE = 1000  # floats: 4000 bytes


def step_of(link: Link, *choices: Swapped, storages: int = 1, **options: Any) -> SwappedStep:
    """A step whose plan expects ``storages`` of 4000 bytes, packed one after the other."""
    planned = tuple(PlannedStorage(4 * SIZE, (n,), 100 + n) for n in range(storages))
    plan = SwapPlan(
        200, 1024, planned, choices, default_order(planned, choices), None, 0, (0,) * 201, 0.0, 0.0
    )
    return SwappedStep(plan, link, Candidates(nn.Identity()), **options)


def at_once(link: Link, model: nn.Module | None = None) -> SwappedStep:
    return SwappedStep(None, link, Candidates(model or nn.Identity()))


def leaf() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(SIZE, requires_grad=True)


def gradient(link: Link, body: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Gradient of ``body`` with everything swapped, after it was found the same without hooks."""
    x = leaf()
    (plain,) = torch.autograd.grad(body(x), x)
    step = at_once(link)
    with step.hooks():
        y = body(x)
    (swapped,) = torch.autograd.grad(y, x)
    step.end()
    assert step.counts.num_swapped and step.counts.in_bytes
    assert torch.equal(plain, swapped)
    return swapped
