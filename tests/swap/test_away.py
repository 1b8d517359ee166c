"""What is away cannot be read, and what somebody holds stays."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn, optim

from elbowroom.core.errors import SwapError
from elbowroom.swap.away import AwayTensor
from tests.swap.optimizers import (
    ADAMW,
    assert_equal,
    loss_of,
    model_of,
    swapped,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_state_dict_that_is_held_stays_here_and_says_what_is_true() -> None:
    model = model_of()
    optimizer = swapped(ADAMW(model.parameters()))
    train(model, optimizer, range(2))
    whole = optimizer.state_dict()
    train(model, optimizer, range(2, 4))
    expected = model_of()
    plain = ADAMW(expected.parameters())
    train(expected, plain, range(4))
    assert_equal(plain.state_dict()["state"], whole["state"])
    assert not isinstance(optimizer.state[model[0].weight]["exp_avg"], AwayTensor)
    del whole
    optimizer.send_away()
    assert isinstance(optimizer.state[model[0].weight]["exp_avg"], AwayTensor)


READS: dict[str, Callable[[torch.Tensor, nn.Module], Any]] = {
    "clip": lambda g, m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "clip foreach": lambda g, m: nn.utils.clip_grad_norm_(m.parameters(), 1.0, foreach=True),
    "clip value": lambda g, m: nn.utils.clip_grad_value_(m.parameters(), 1.0),
    "norm": lambda g, m: g.norm(),
    "foreach norm": lambda g, m: torch._foreach_norm([torch.ones(3), g]),
    "mul_": lambda g, m: g.mul_(2),
    "add": lambda g, m: torch.ones(24, 24) + g,
    "zero_": lambda g, m: m.zero_grad(set_to_none=False),
    "item": lambda g, m: g[0, 0].item(),
    "isnan": lambda g, m: g.isnan().any(),
    "copy": lambda g, m: torch.empty(24, 24).copy_(g),
    "out": lambda g, m: torch.add(torch.ones(24, 24), 1, out=g),
    "clone": lambda g, m: g.detach().clone(),
    "numpy": lambda g, m: g.numpy(),
    "tolist": lambda g, m: g.tolist(),
    "data": lambda g, m: g.data,
    "pointer": lambda g, m: g.data_ptr(),
    "share": lambda g, m: g.share_memory_(),
    "deepcopy": lambda g, m: copy.deepcopy(g),
    "save": lambda g, m: torch.save(g, io.BytesIO()),
    "scaler": lambda g, m: scaled_step(m),
    "plain step": lambda g, m: optim.SGD(m.parameters(), lr=0.1).step(),
    "plain foreach": lambda g, m: optim.AdamW(m.parameters(), foreach=True).step(),
    "plain fused": lambda g, m: optim.AdamW(m.parameters(), fused=True).step(),
    "double": lambda g, m: m.double(),
}


WRITES = {"zero_", "plain step", "plain foreach", "double"}
"""Those that change gradients or weights that are here before they meet one that is away."""


def scaled_step(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.unscale_(optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("read", READS)
def test_a_gradient_that_is_away_cannot_be_read(read: str) -> None:
    model = model_of()
    optimizer = swapped(ADAMW(model.parameters()))
    loss_of(model).backward()
    gradient = model[1].weight.grad
    assert isinstance(gradient, AwayTensor)
    assert (gradient.shape, gradient.dtype) == ((24, 24), torch.float32)
    assert "gradient" in repr(gradient)
    with pytest.raises((SwapError, RuntimeError)):
        READS[read](gradient, model)
    if read not in WRITES:
        optimizer.step()
        plain = model_of()
        train(plain, ADAMW(plain.parameters()), range(1))
        assert_equal(weights(plain), weights(model))


def test_state_that_is_away_cannot_be_read() -> None:
    model = model_of()
    optimizer = swapped(inner := ADAMW(model.parameters()))
    train(model, optimizer, range(1))
    away = optimizer.state[model[0].weight]["exp_avg"]
    with pytest.raises(SwapError, match="state_dict"):
        away.norm()
    loss_of(model).backward()
    with optimizer.gradients(), pytest.raises(SwapError, match="state_dict"):
        inner.step()


def test_who_needs_gradients_gets_them_and_may_change_them() -> None:
    outcomes = []
    for is_swapped in (False, True):
        model = model_of()
        optimizer = ADAMW(model.parameters())
        if is_swapped:
            optimizer = swapped(optimizer, clip_norm=1e-3)
        for seed in range(3):
            loss_of(model, seed).backward()
            held = model[0].weight.grad  # a placeholder, or the gradient
            with optimizer.gradients() if is_swapped else nullcontext():
                held = model[0].weight.grad
                for parameter in model[1].parameters():
                    parameter.grad.mul_(0.5)
            held.mul_(0.25)  # it is held, so it has stayed
            norm = None if is_swapped else nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append([optimizer.last_norm if is_swapped else norm, *weights(model)])
    assert_equal(*outcomes)
