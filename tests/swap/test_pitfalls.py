"""What goes wrong with hooks for saved tensors elsewhere is right here, or raises: never else."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from elbowroom.plans.swap import PlannedStorage, Swapped, SwapPlan, default_order
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.tier import MemoryTier, Slot
from tests.swap.models import Case
from tests.swap.steps import profiled

SIZE = 1000  # floats: 4000 bytes
IN_PLACE = "modified by an inplace operation"


def step_of(link: Link, *choices: Swapped, storages: int = 1, **options: Any) -> SwappedStep:
    """A step whose plan expects ``storages`` of 4000 bytes, packed one after the other."""
    planned = tuple(PlannedStorage(4 * SIZE, (n,), 100 + n) for n in range(storages))
    plan = SwapPlan(
        200, 1024, planned, choices, default_order(planned, choices), None, 0, 0, 0.0, 0.0
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


class SlowTier(MemoryTier):
    """Copies begin when they are let."""

    def __init__(self) -> None:
        super().__init__(1 << 24)
        self.may_go = threading.Event()

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        assert self.may_go.wait(30)
        super().write(slot, address, num_bytes)


def written_after_save(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y.pow(2)  # saves y
    y.add_(1)
    return z.sum()


def test_a_kept_tensor_written_after_its_save_raises_as_in_pytorch(link: Link) -> None:
    with pytest.raises(RuntimeError, match=IN_PLACE):
        written_after_save(leaf()).backward()
    step = step_of(link)
    with step.hooks():
        loss = written_after_save(leaf())
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()
    assert not step.counts.num_swapped


def test_a_tensor_written_after_it_left_has_the_right_gradient(link: Link) -> None:
    x = leaf()
    step = at_once(link)
    with step.hooks():
        loss = written_after_save(x)
    loss.backward()
    assert torch.equal(x.grad, 8 * x)


def test_a_tensor_written_while_it_is_copied_raises(one_thread: None) -> None:
    tier = SlowTier()
    link = Link(tier)
    step = step_of(link, Swapped(0, 50, 100))
    with step.hooks():
        loss = written_after_save(leaf())
    tier.may_go.set()
    step.end()
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()
    assert step.counts.num_swapped == 1
    link.close()


def test_a_parameter_written_between_forward_and_backward_raises(link: Link) -> None:
    layer = nn.Linear(40, 40)
    x = torch.randn(8, 40, requires_grad=True)
    with at_once(link, layer).hooks():
        loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


def test_a_tensor_written_between_two_saves_is_saved_twice(link: Link) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = y.pow(2)
        y.add_(1)
        return (first + y.pow(3)).sum()

    x = leaf()
    step = at_once(link)
    with step.hooks():
        loss = body(x)
    loss.backward()
    assert step.counts.num_swapped == 2
    assert torch.allclose(x.grad, 8 * x + 6 * (2 * x + 1) ** 2)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_graph_that_has_no_backward_is_released(link: Link, is_kept: bool) -> None:
    gc.disable()
    try:
        step = step_of(link) if is_kept else at_once(link)
        with step.hooks():
            y = leaf().exp()  # saves its own output
        storage = StorageWeakRef(y.untyped_storage())
        step.end()
        del y
        assert storage.expired()
    finally:
        gc.enable()


class Twice(torch.autograd.Function):
    """Square that reads what it saved twice, and has another tensor beside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.beside = x * 1
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (one,) = ctx.saved_tensors
        (two,) = ctx.saved_tensors
        return (one + two) * grad * (ctx.beside / ctx.beside)


class Spoils(torch.autograd.Function):
    """Square whose backward writes into what it saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return x.mul_(2) * grad


def test_a_custom_function_may_read_twice_and_hold_tensors_of_its_own(link: Link) -> None:
    gradient(link, lambda x: Twice.apply(x * 3).sum())


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_a_backward_wrote_into_is_not_used_again(link: Link, is_kept: bool) -> None:
    with (step_of(link) if is_kept else at_once(link)).hooks():
        loss = Spoils.apply(leaf() * 3).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


def test_a_retained_graph_has_a_second_backward(link: Link) -> None:
    x = leaf()
    step = at_once(link)
    with step.hooks():
        loss = (x * 2).exp().sin().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    assert (step.counts.num_swapped, step.counts.in_bytes) == (1, 4 * SIZE)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_second_derivatives_are_the_same(link: Link) -> None:
    def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (first,) = torch.autograd.grad((x * 2).exp().sin().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.pow(2).sum(), x)

    x = leaf()
    plain = twice(x)
    step = at_once(link)
    with step.hooks():
        swapped = twice(x)
    step.end()
    assert all(map(torch.equal, plain, swapped))
    assert step.counts.in_bytes > 0


@pytest.mark.parametrize(
    "body",
    [
        lambda x: (x.view(50, 20).t() * 2).sin().sum(),
        lambda x: (x * 2)[::3].exp().pow(2).sum(),
        lambda x: (x * 2)[100:900].view(40, 20).pow(2).sum(),
        lambda x: (x * 2).view(10, 100, 1).expand(10, 100, 3).sin().sum(),
        lambda x: torch.view_as_complex((x * 2).view(500, 2)).pow(2).abs().sum(),
        lambda x: (x * 2).to(torch.bfloat16).exp().float().sum(),
        lambda x: (x * 2).to(torch.float64).exp().sum(),
        lambda x: torch.view_as_complex((x * 2).view(500, 2)).conj().pow(2).abs().sin().sum(),
        lambda x: torch.view_as_complex((x * 2).view(500, 2)).conj().imag.pow(2).exp().sum(),
    ],
)
def test_views_and_other_types_come_back_as_they_were(
    link: Link, body: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    gradient(link, body)


def test_sparse_tensors_stay(link: Link) -> None:
    sparse = torch.eye(SIZE).to_sparse()
    gradient(link, lambda x: torch.sparse.mm(sparse, (x * 2).sin().view(-1, 1)).pow(2).sum())


class Marked(torch.Tensor):
    """A subclass that loses nothing and adds nothing."""


def test_subclasses_stay(link: Link) -> None:
    x = leaf()
    step = at_once(link)
    with step.hooks():
        y = (x * 2).as_subclass(Marked).sin().as_subclass(torch.Tensor).sum()
    y.backward()
    assert not step.counts.num_swapped
    assert torch.equal(x.grad, 2 * (2 * x).cos())


def test_function_transforms_say_that_they_cannot(link: Link) -> None:
    with at_once(link).hooks(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: x.exp().sum())(leaf())


@pytest.mark.parametrize("is_reentrant", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_checkpoints_are_swapped(link: Link, is_reentrant: bool, backward_inside: bool) -> None:
    x = leaf()

    def body() -> torch.Tensor:
        y = x * 2
        return checkpoint(lambda y: y.sin().exp().cos(), y, use_reentrant=is_reentrant).sum()

    (plain,) = _grads(body(), x)
    step = at_once(link)
    with step.hooks():
        loss = body()
        if backward_inside:
            swapped = _grads(loss, x)
    if not backward_inside:
        swapped = _grads(loss, x)
    step.end()
    assert torch.equal(plain, swapped[0])
    assert step.counts.num_swapped >= 1


def _grads(loss: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    x.grad = None
    loss.backward()
    assert x.grad is not None
    return [x.grad.clone()]


def test_autocast_gives_the_same_gradients(link: Link) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    x = torch.randn(32, 64)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().pow(2).mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    step = at_once(link, model)
    with step.hooks():
        swapped = gradients()
    step.end()
    assert all(map(torch.equal, plain, swapped))
    assert step.counts.num_swapped >= 4


def test_other_threads_are_left_alone(link: Link) -> None:
    step = at_once(link)
    x = leaf()
    with step.hooks():
        thread = threading.Thread(target=lambda: (x * 2).sin().sum().backward())
        thread.start()
        thread.join()
    assert x.grad is not None and not step.counts.num_packs


def test_storages_that_are_emptied_and_refilled_for_a_parameter_stay(link: Link) -> None:
    """As FSDP does with unsharded parameters: views of a Parameter, gathered again for backward."""
    whole = nn.Parameter(torch.full((SIZE,), 3.0))
    x = leaf()
    step = at_once(link)
    with step.hooks():
        y = (x * 2).mul(whole.view(SIZE))
        loss = y.sum()
    storage = whole.untyped_storage()
    before = storage.nbytes()
    storage.resize_(0)
    storage.resize_(before)
    with torch.autograd._unsafe_preserve_version_counter(whole), torch.no_grad():
        whole.fill_(3.0)
    loss.backward()
    assert torch.equal(x.grad, torch.full((SIZE,), 6.0))
    assert step.counts.num_swapped == 1  # x * 2 alone


def test_what_somebody_else_holds_gains_nothing_and_is_known(link: Link) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    inputs = torch.randn(32, 64)
    case = Case(model, inputs, torch.zeros(32, dtype=torch.long))
    profile = profiled(case, link)
    elsewhere = [s for s in profile.storages if s.is_held_elsewhere]
    assert inputs.nbytes in [s.num_bytes for s in elsewhere]
    assert len(elsewhere) < len(profile.storages)


@contextmanager
def emptied_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.nightly
def test_a_compiled_model_is_swapped(link: Link) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    x = torch.randn(32, 64)
    with emptied_cache():
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x).sum().backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        step = at_once(link, model)
        with step.hooks():
            compiled(x).sum().backward()
        step.end()
    assert step.counts.num_swapped
    assert all(map(torch.equal, plain, [parameter.grad for parameter in model.parameters()]))
