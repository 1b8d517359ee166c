"""Optimizers with state and gradients away train bitwise as plain ones, and hold far less."""

from __future__ import annotations

import copy
import gc
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim

from elbowroom.app.swap import Swap
from elbowroom.core.errors import InputError, SwapError, TierFullError
from elbowroom.planning.swap.choose import with_static_bytes
from elbowroom.planning.swap.memory import floor_bytes
from elbowroom.swap.away import AwayTensor
from elbowroom.swap.link import Link
from elbowroom.swap.meter import uncounted_bytes
from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.tier import MemoryTier, Slot
from tests.swap.models import make
from tests.swap.steps import needed_meter

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


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    gc.collect()
    yield


def model_of(width: int = 24, depth: int = 3) -> nn.Sequential:
    """Linear layers, of which one takes part in no loss, and one has another type."""
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


def saved(whole: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it would come back from a file."""
    return copy.deepcopy(whole)


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


# Memory.


def chain(depth: int = 16, width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


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


# What cannot work, and what breaks.


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
