"""What a model does in calls in a row, and what they leave behind, to be compared with a graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from elbowroom.training.python_state import PythonState, write_back
from elbowroom.training.values import copy_of, tensors_in

RELATIVE_ERROR, ROUNDINGS = 1e-3, 8
"""Tolerance of a graph against its model, in the norm: relative, or in roundings of the dtype.

The larger of the two counts. The same kernels give the same bits, but not on every device, and
export may choose other kernels.
"""

NUM_CALLS = 3
"""Calls in a row that a graph and its model are compared in."""


def in_training(model: nn.Module) -> nn.Module:
    """The model in training mode. What a model that trains keeps in ``eval()`` itself stays so."""
    return model if model.training else model.train()


@contextmanager
def untouched(model: nn.Module, *functions: Callable[..., Any]) -> Iterator[None]:
    """Put back what runs and tracers change: buffers, Python's state, modes, random numbers.

    Python's state is what the model and the functions can reach.
    """
    python = PythonState(model, *functions)
    try:
        with tensors_untouched(model):
            yield
    finally:
        python.put_back()


@contextmanager
def tensors_untouched(model: nn.Module) -> Iterator[None]:
    """Put back buffers, and the random numbers of torch, numpy and Python."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, buffers in modules:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values:
            write_back(buffer, value)


def seed_minibatch(seed: int, stage: int, minibatch: int) -> None:
    """Seed torch's random numbers for one minibatch in one stage, however a run came to it."""
    key = np.random.SeedSequence((seed, stage, minibatch))
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def seed_all() -> None:
    """Seed the random numbers of torch, numpy and Python, within ``tensors_untouched``."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@dataclass(frozen=True)
class Outcome:
    """What calls in a row gave, and what they left behind.

    Args:
        calls: for each call its outputs, and the gradients of the sum of their squares.
        buffers: the model's buffers after the calls.
        draws: the state of torch's generator of random numbers after the calls.

    """

    calls: list[list[torch.Tensor | None]]
    buffers: list[torch.Tensor]
    draws: torch.Tensor


def outcome_of(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> Outcome:
    """Run several times in a row; all is as before afterwards."""
    with untouched(model), torch.enable_grad():
        seed_all()
        calls = [_values_and_gradients(model, run, inputs) for _ in range(NUM_CALLS)]
        return Outcome(
            calls,
            [buffer.detach().clone() for buffer in model.buffers()],
            torch.get_rng_state(),
        )


def _values_and_gradients(
    model: nn.Module, run: Callable[[Any], Any], inputs: Any
) -> list[torch.Tensor | None]:
    outputs = tensors_in(run(copy_of(inputs)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [x.square().sum() for x in outputs if x.requires_grad]
    kept = [x.detach().clone() for x in outputs]
    if not losses or not parameters:
        return [*kept]
    total = torch.stack([loss.double() for loss in losses]).sum()
    return [*kept, *torch.autograd.grad(total, parameters, allow_unused=True)]


def difference(model: Outcome, graph: Outcome) -> str | None:
    """What a graph does otherwise than its model, if anything."""
    if not torch.equal(model.draws, graph.draws):
        return "the forward draws random numbers while it is traced: use torch's functions in it"
    for number, (one, other) in enumerate(zip(model.calls, graph.calls, strict=True)):
        if len(one) != len(other) or not all(map(is_close, one, other)):
            if number:
                return "the forward depends on earlier calls, which a graph does not: use buffers"
            return "what was traced computes something else than the model"
    if not all(map(is_close, model.buffers, graph.buffers)):
        return "what was traced leaves other buffers than the model"
    return None


def is_close(
    one: torch.Tensor | None,
    other: torch.Tensor | None,
    relative_error: float = RELATIVE_ERROR,
    roundings: int = ROUNDINGS,
) -> bool:
    """Whether two tensors agree in the norm, or there are none; numbers that are not floats, all.

    The larger tolerance counts: relative, or in roundings of the dtype.
    """
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    tolerance = max(relative_error, roundings * torch.finfo(one.dtype).eps)
    one, other = (_as_reals(x) for x in (one, other))
    return bool((one - other).norm() <= tolerance * one.norm())


def _as_reals(tensor: torch.Tensor) -> torch.Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().double().nan_to_num()
