"""Optimizers that cannot be away are refused, and failures lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

from elbowroom.core.errors import InputError, SwapError, TierFullError
from elbowroom.swap.away import AwayTensor
from elbowroom.swap.link import Link
from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.tier import MemoryTier, Slot
from tests.swap.optimizers import (
    ADAMW,
    Maker,
    assert_equal,
    loss_of,
    model_of,
    saved,
    swapped,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Coupled(optim.SGD):
    """Counts its updates in its group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / group["count"])


class Alone(optim.SGD):
    """An update of somebody's own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        optim.LBFGS,
        lambda p: optim.SparseAdam(list(p)),
        lambda p: optim.AdamW(p, foreach=True),
        lambda p: optim.AdamW(p, fused=True),
        lambda p: optim.AdamW(p, differentiable=True),
        lambda p: optim.SGD([nn.Parameter(torch.empty(3, device="meta"))], lr=0.1),
        lambda p: swapped(ADAMW(p)),
        Alone,
    ],
)
def test_what_cannot_be_swapped_is_refused(make_optimizer: Maker) -> None:
    optimizer = make_optimizer(model_of().parameters())
    with pytest.raises(InputError):
        swapped(optimizer)


def test_parameters_have_one_swapped_optimizer_at_a_time() -> None:
    model = model_of()
    with swapped(ADAMW(model.parameters())), pytest.raises(InputError, match="another"):
        swapped(ADAMW(model[1].parameters()))
    with swapped(ADAMW(model.parameters())):
        pass


def test_a_refused_group_is_not_added() -> None:
    model = model_of()
    optimizer = swapped(optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(InputError, match="foreach"):
        optimizer.add_param_group({"params": model[1].parameters(), "foreach": True})
    assert len(optimizer.param_groups) == 1


def test_a_promise_that_an_update_is_alone_is_taken_and_checked() -> None:
    plain, model = model_of(), model_of()
    train(plain, optim.SGD(plain.parameters(), lr=0.1))
    calls = []
    optimizer = swapped(Alone(model.parameters(), lr=0.1), updates_alone=True)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer)
    assert_equal(weights(plain), weights(model))
    assert len(calls) == 4
    optimizer.close()
    coupled = swapped(Coupled(model.parameters(), lr=0.1), updates_alone=True)
    with pytest.raises(SwapError, match="groups"):
        train(model, coupled)


class LimitedTier(MemoryTier):
    """Writes fail after so many, for good."""

    def __init__(self, num_good: int) -> None:
        super().__init__(1 << 26)
        self.num_good = num_good

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        self.num_good -= 1
        if self.num_good < 0:
            raise OSError("gone")
        super().write(slot, address, num_bytes)


def test_a_tier_that_is_full_ends_the_backward_and_loses_nothing() -> None:
    model = model_of()
    optimizer = swapped(ADAMW(model.parameters()), tier=MemoryTier(8192))
    with pytest.raises(TierFullError):
        train(model, optimizer)
    with optimizer.gradients():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("num_good", range(0, 22, 3))
def test_after_a_failure_of_the_link_all_state_can_still_be_read(num_good: int) -> None:
    """Each parameter's state is that of after its last update."""
    num_steps = 3
    model = model_of()
    optimizer = swapped(ADAMW(model.parameters()), tier=LimitedTier(num_good))
    with pytest.raises(SwapError) as caught:
        train(model, optimizer, range(num_steps))
    assert isinstance(caught.value.__cause__, OSError) or "parameters" in str(caught.value)
    plain = model_of()
    expected = ADAMW(plain.parameters())
    states, steps = [], []
    for step in range(num_steps):
        train(plain, expected, range(step, step + 1))
        states.append(saved(expected.state_dict())["state"])
        steps.append(weights(plain))
    whole = optimizer.state_dict()["state"]
    found = weights(model)
    for number, state in whole.items():
        done = int(state["step"]) - 1
        assert_equal(states[done][number], state)
        assert torch.equal(steps[done][number], found[number])


def test_a_closed_tier_is_no_longer_read() -> None:
    model = model_of()
    optimizer = swapped(ADAMW(model.parameters()))
    train(model, optimizer)
    optimizer.close()
    with pytest.raises(SwapError, match="closed"):
        optimizer.state_dict()
    loss_of(model).backward()
    assert not isinstance(model[0].weight.grad, AwayTensor)  # its hooks are gone


def test_a_link_may_be_shared_and_is_not_closed(link: Link) -> None:
    for _ in range(2):
        model = model_of()
        with SwappedOptimizer(ADAMW(model.parameters()), link=link) as optimizer:
            train(model, optimizer)
        assert link.out_bytes
    with pytest.raises(InputError):
        SwappedOptimizer(ADAMW(model.parameters()), link=link, tier=MemoryTier(1))


def test_nothing_stays_in_the_tier_when_gradients_are_forgotten() -> None:
    model = model_of()
    total = sum(p.nbytes for p in model.parameters())
    optimizer = swapped(optim.SGD(model.parameters(), lr=0.1), tier=MemoryTier(2 * total))
    train(model, optimizer, range(30))
    loss_of(model).backward()
    model.zero_grad()
    train(model, optimizer, range(30))
