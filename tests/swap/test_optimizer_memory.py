"""Optimizers that are away need far less memory, alone and under a budget for activations."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn, optim

from elbowroom.app.swap import Swap
from elbowroom.core.errors import InputError
from elbowroom.planning.swap.choose import with_static_bytes
from elbowroom.planning.swap.memory import floor_bytes
from elbowroom.swap.meter import uncounted_bytes
from elbowroom.swap.tier import MemoryTier
from tests.swap.models import make
from tests.swap.optimizers import (
    ADAMW,
    swapped,
    train,
)
from tests.swap.steps import needed_meter

pytestmark = pytest.mark.usefixtures("one_thread")


def chain(depth: int = 16, width: int = 128, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias) for _ in range(depth)])


def peak_over_weights(
    wrap: Callable[[optim.Optimizer], optim.Optimizer], clip: float | None
) -> float:
    """Metered peak of training with AdamW, all in it, over the bytes of the weights."""
    meter = needed_meter()
    gc.collect()
    held = meter.held_bytes
    meter.reset_peak()
    model = chain()
    optimizer = wrap(ADAMW(model.parameters()))
    train(model, optimizer, range(3), clip)
    total = sum(parameter.nbytes for parameter in model.parameters())
    return (meter.peak_bytes - held) / total


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_adamw_needs_less_than_half_of_its_memory(clip: float | None) -> None:
    assert peak_over_weights(lambda inner: inner, clip) >= 4.0
    assert peak_over_weights(lambda inner: swapped(inner, clip_norm=clip), None) <= 1.6


@pytest.mark.parametrize("num_batches", [1, 2])
def test_two_gradients_are_held_at_once(num_batches: int) -> None:
    """One that is copied and one that is made, or one that is added to another."""
    meter, depth = needed_meter(), 16
    model = chain(depth, bias=False)
    optimizer = swapped(optim.SGD(model.parameters(), lr=0.1))
    train(model, optimizer, range(1), num_batches=num_batches)
    gc.collect()
    held = meter.held_bytes
    meter.reset_peak()
    train(model, optimizer, range(2), num_batches=num_batches)
    of_layer = sum(parameter.nbytes for parameter in model.parameters()) / depth
    assert meter.peak_bytes - held <= 2.5 * of_layer


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_a_budget_for_activations_and_an_optimizer_that_is_away_compose(name: str) -> None:
    needed_meter()
    losses = []
    for is_swapped in (False, True):
        case = make(name)
        optimizer = optim.AdamW(case.model.parameters(), lr=1e-2)
        swap = None
        if is_swapped:
            optimizer = swapped(optimizer, clip_norm=0.1)
            swap = Swap(case.model, optimizer=optimizer, budget="1GiB", tier=MemoryTier(1 << 26))
        of_run = []
        for step in range(6):
            with swap.step() if swap else nullcontext():
                loss = case.loss()
                loss.backward()
            of_run.append(loss.item())
            del loss
            if swap:
                report = swap.report()
                assert report.plan is None or report.predicted_peak_bytes == report.peak_bytes
                assert uncounted_bytes(needed_meter(), case.model, optimizer) == 0
            else:
                nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            if swap and step == 2:  # from here on with less than a page over the floor
                profile = with_static_bytes(swap.profile, swap.plan.static_bytes)
                swap.close()
                swap = Swap(
                    case.model,
                    optimizer=optimizer,
                    budget=floor_bytes(profile) + 4000,
                    tier=MemoryTier(1 << 26),
                )
            if swap and step == 3:
                optimizer.state_dict()  # it is here now, and leaves before the next step begins
        losses.append(of_run)
    assert losses[0] == losses[1]


def test_a_plan_for_the_other_kind_of_optimizer_is_refused() -> None:
    needed_meter()
    for is_swapped in (False, True):
        case = make("cnn")
        plain = optim.AdamW(case.model.parameters())
        optimizer = swapped(plain) if is_swapped else plain
        with Swap(case.model, optimizer=optimizer, budget="1GiB") as swap:
            for _ in range(2):
                with swap.step():
                    case.loss().backward()
            plan = swap.plan
        assert plan.swaps_optimizer == is_swapped
        assert type(plan).from_json(plan.to_json()).swaps_optimizer == is_swapped
        other = plain if is_swapped else swapped(plain)
        with pytest.raises(InputError, match="SwappedOptimizer"):
            Swap(case.model, plan, other)
        with Swap(case.model, plan, optimizer):
            pass
