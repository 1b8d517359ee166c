"""What autograd saves in other ways comes back as it was: views, types, second backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from tests.swap.small import SIZE, at_once, gradient, leaf


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


def test_a_custom_function_may_read_twice_and_hold_tensors_of_its_own(link: Link) -> None:
    gradient(link, lambda x: Twice.apply(x * 3).sum())


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


class Cells(nn.Module):
    """A cell that is called for each row."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for row in x:
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


class Chunks(nn.Module):
    """Writes into chunks of one storage, each of which has a version counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.linear(x).unsafe_chunk(2, -1)
        return one.sigmoid_() * other.tanh_()


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: nn.GRU(32, 32, 2, bidirectional=True),
    "lstm64": lambda: nn.LSTM(32, 32).double(),
    "projected": lambda: nn.LSTM(32, 32, proj_size=16),
    "rnn": lambda: nn.RNN(32, 32),
    "gru cell": lambda: Cells(nn.GRUCell(32, 32)),
    "lstm cell": lambda: Cells(nn.LSTMCell(32, 32)),
    "chunks": Chunks,
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_parts_of_a_storage_may_be_written_after_others_left(
    link: Link, name: str, verify: bool
) -> None:
    torch.manual_seed(3)
    model = RECURRENT[name]()
    x = torch.randn(6, 8, 32, dtype=next(model.parameters()).dtype)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).pow(2).mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    step = SwappedStep(None, link, Candidates(model, 256), verify=verify)
    with step.hooks():
        found = gradients()
    step.end()
    assert step.counts.num_swapped
    assert all(map(torch.equal, plain, found))


def test_what_function_transforms_save_inside_stays(link: Link) -> None:
    model = nn.Linear(32, 32)

    def body(x: torch.Tensor) -> torch.Tensor:
        _, tangent = torch.func.jvp(lambda v: model(v).tanh(), (x,), (torch.ones_like(x),))
        return tangent.pow(2).sum()

    x = torch.randn(16, 32)
    (plain,) = torch.autograd.grad(body(x), [model.weight])
    step = at_once(link, model)
    with step.hooks():
        loss = body(x)
    (found,) = torch.autograd.grad(loss, [model.weight])
    step.end()
    assert torch.equal(plain, found)
