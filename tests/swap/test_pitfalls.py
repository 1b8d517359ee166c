"""What goes wrong with hooks for saved tensors elsewhere is right here, or raises: never else."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from elbowroom.plans.swap import Swapped
from elbowroom.swap.link import Link
from elbowroom.swap.tier import MemoryTier, Slot
from tests.swap.models import Case
from tests.swap.small import SIZE, at_once, leaf, step_of
from tests.swap.steps import profiled

IN_PLACE = "modified by an inplace operation"


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


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_a_backward_wrote_into_is_not_used_again(link: Link, is_kept: bool) -> None:
    with (step_of(link) if is_kept else at_once(link)).hooks():
        loss = Spoils.apply(leaf() * 3).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


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
