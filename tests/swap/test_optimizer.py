"""Optimizers with state and gradients away train bitwise as plain ones."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn, optim

from elbowroom.app.swap import Swap
from elbowroom.swap.away import AwayTensor
from tests.swap.optimizers import (
    ADAMW,
    OPTIMIZERS,
    assert_equal,
    loss_of,
    model_of,
    saved,
    swapped,
    train,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_state_are_bitwise_those_of_the_plain_optimizer(
    name: str, clip: float | None
) -> None:
    plain, model = model_of(), model_of()
    expected, inner = OPTIMIZERS[name](plain.parameters()), OPTIMIZERS[name](model.parameters())
    with swapped(inner, clip_norm=clip) as optimizer:
        train(plain, expected, clip=clip)
        train(model, optimizer)
        assert_equal(weights(plain), weights(model))
        for state in optimizer.state.values():
            assert all(
                isinstance(each, AwayTensor) == (each.nbytes >= 1024)
                for each in state.values()
                if isinstance(each, torch.Tensor)
            )
        assert_equal(expected.state_dict(), optimizer.state_dict())
    assert not torch.equal(model[0].weight, model_of()[0].weight)


def test_groups_keep_their_settings_and_may_be_added() -> None:
    outcomes = []
    for wrap in (nullcontext, swapped):
        model = model_of()
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": model[1].parameters(), "weight_decay": 0.5},
        ]
        inner = optim.AdamW(groups, lr=1e-2)
        optimizer = inner if wrap is nullcontext else wrap(inner)
        train(model, optimizer, range(2))
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.3})
        train(model, optimizer, range(2, 4))
        assert optimizer.param_groups is inner.param_groups
        outcomes.append((weights(model), optimizer.state_dict()))
    assert_equal(outcomes[0][0], outcomes[1][0])
    assert_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("is_swapped_step", [False, True])
def test_gradients_of_several_backwards_add_up(clip: float | None, is_swapped_step: bool) -> None:
    plain, model = model_of(), model_of()
    train(plain, ADAMW(plain.parameters()), clip=clip, num_batches=3)
    with swapped(ADAMW(model.parameters()), clip_norm=clip) as optimizer:
        budget = Swap(model, optimizer=optimizer, budget="1GiB") if is_swapped_step else None
        for step in range(4):
            with budget.step() if budget else nullcontext():
                for batch in range(3):
                    loss_of(model, 10 * step + batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        if budget:
            assert budget.report().predicted_peak_bytes == budget.report().peak_bytes
            budget.close()
    assert_equal(weights(plain), weights(model))


def test_gradients_that_nobody_forgot_are_added_to_as_they_were_clipped() -> None:
    plain, model = model_of(), model_of()
    expected, optimizer = (
        ADAMW(plain.parameters()),
        swapped(ADAMW(model.parameters()), clip_norm=1e-3),
    )
    for seed in range(3):
        loss_of(plain, seed).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
        expected.step()
        loss_of(model, seed).backward()
        optimizer.step()
        assert torch.equal(norm, optimizer.last_norm)
    for step in (expected.step, optimizer.step):  # and once more without a backward
        if step == expected.step:
            nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
        step()
    assert_equal(weights(plain), weights(model))
    with optimizer.gradients():
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
    optimizer.close()


def test_zeros_are_gradients_too() -> None:
    outcomes = []
    for wrap in (lambda inner: inner, swapped):
        model = model_of()
        optimizer = wrap(optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5))
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        outcomes.append(weights(model))
    assert_equal(*outcomes)
    assert isinstance(model[0].weight.grad, AwayTensor)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.bfloat16,)])
def test_norms_of_several_types_are_pytorchs(dtypes: tuple[torch.dtype, ...]) -> None:
    outcomes = []
    for is_swapped in (False, True):
        torch.manual_seed(0)
        weights_ = [nn.Parameter(torch.randn(40, 30).to(dtypes[n % len(dtypes)])) for n in range(6)]
        optimizer = optim.SGD(weights_, lr=0.1)
        if is_swapped:
            optimizer = swapped(optimizer, clip_norm=0.1)
        sum(weight.float().pow(2).sum() for weight in weights_).backward()
        norm = None if is_swapped else nn.utils.clip_grad_norm_(weights_, 0.1)
        optimizer.step()
        outcomes.append([optimizer.last_norm if is_swapped else norm, *weights_])
    assert_equal(*outcomes)


def closure_of(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss


def test_schedulers_hooks_and_closures_are_those_of_any_optimizer() -> None:
    outcomes, calls = [], []
    for is_swapped in (False, True):
        model = model_of()
        inner = ADAMW(model.parameters())
        inner.register_step_pre_hook(lambda *_: calls.append("inner"))
        optimizer = swapped(inner) if is_swapped else inner
        assert isinstance(optimizer, optim.Optimizer)
        optimizer.register_step_pre_hook(lambda hooked, *_: calls.append(hooked))
        optimizer.register_step_post_hook(lambda hooked, *_: calls.append(hooked))
        scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(3):
                loss = optimizer.step(partial(closure_of, model, optimizer, seed))
                scheduler.step()
        assert calls == ["inner", optimizer, optimizer] * 3
        calls.clear()
        outcomes.append((loss, weights(model), scheduler.get_last_lr()))
    assert_equal(list(outcomes[0]), list(outcomes[1]))


@pytest.mark.parametrize(
    "kinds", [("swapped", "swapped"), ("swapped", "plain"), ("plain", "swapped")]
)
def test_state_dicts_go_from_either_kind_to_either(kinds: tuple[str, str]) -> None:
    expected = model_of()
    train(expected, ADAMW(expected.parameters()), range(4))
    wraps = {"swapped": swapped, "plain": lambda inner: inner}
    model, other = model_of(), model_of()
    first = wraps[kinds[0]](ADAMW(model.parameters()))
    train(model, first, range(2))
    whole = saved(first.state_dict())
    other.load_state_dict(model.state_dict())
    second = wraps[kinds[1]](ADAMW(other.parameters()))
    second.load_state_dict(whole)
    for run, optimizer in ((model, first), (other, second)):  # to save it changes nothing
        train(run, optimizer, range(2, 4))
        assert_equal(weights(expected), weights(run))


def made_positive(parameter: torch.Tensor) -> None:
    parameter.grad.abs_()


def test_a_gradient_that_a_hook_changes_while_it_leaves_is_copied_again() -> None:
    outcomes = []
    for is_swapped in (False, True):
        model = model_of()
        optimizer = swapped(ADAMW(model.parameters())) if is_swapped else ADAMW(model.parameters())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(made_positive)
        train(model, optimizer)
        outcomes.append(weights(model))
    assert_equal(*outcomes)


def test_weights_that_are_frozen_for_a_while_and_sparse_gradients_are_right() -> None:
    outcomes = []
    for is_swapped in (False, True):
        torch.manual_seed(0)
        table, head = nn.Embedding(50, 16, sparse=True), nn.Linear(16, 40)
        head.weight.requires_grad_(False)
        parameters = [*table.parameters(), *head.parameters()]
        optimizer = optim.SGD(parameters, lr=0.1)
        if is_swapped:
            optimizer = swapped(optimizer)
        for step in range(4):
            head.weight.requires_grad_(step > 1)
            head(table(torch.arange(3 * step, 3 * step + 4))).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(parameters)
    assert_equal(*outcomes)
