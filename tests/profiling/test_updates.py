"""What the optimizer takes is measured on copies, and shared out by bytes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from elbowroom.profiling.layers import SweepLimits, profile

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = SweepLimits(least=1, seconds=0.0)


def test_updates_of_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer_fn = partial(torch.optim.AdamW, lr=0.1)
    graph = profile(model, torch.randn(3, 8), limits=QUICK, optimizer_fn=optimizer_fn)
    _, first, relu, last = graph.layers
    assert first.update_seconds > 0 == relu.update_seconds
    ratio = first.parameter_bytes / last.parameter_bytes
    assert first.update_seconds / last.update_seconds == pytest.approx(ratio)
    spent = first.forward_seconds + first.backward_seconds + first.update_seconds
    assert first.seconds == pytest.approx(spent)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_an_optimizer_or_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.Tanh())
    assert not any(x.update_seconds for x in profile(model, torch.randn(3, 8), limits=QUICK).layers)
    nothing = nn.Sequential(nn.Tanh())
    graph = profile(
        nothing, torch.randn(3, 8), limits=QUICK, optimizer_fn=partial(torch.optim.SGD, lr=0.1)
    )
    assert not any(layer.update_seconds for layer in graph.layers)
