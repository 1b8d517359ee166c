"""Habits of a forward that no pipeline can follow: it must depend on tensors alone.

Stages are other processes, replicas see other minibatches, and a resumed run begins anew: what
Python keeps, draws or asks the clock for would be something else in each of them.
"""

from __future__ import annotations

import datetime
import inspect
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elbowroom.training.outcome import ROUNDINGS, is_close, seed_all, tensors_untouched, untouched
from elbowroom.training.python_state import PythonState
from elbowroom.training.user_code import is_own
from elbowroom.training.values import copy_of, tensors_in

_SHOWN = 3
_CLOCKS: tuple[Callable[..., object], ...] = (
    *(time.time, time.time_ns, time.monotonic, time.monotonic_ns, time.perf_counter),
    *(time.perf_counter_ns, time.process_time, time.process_time_ns, os.urandom, open),
)
_CHECKPOINT = inspect.unwrap(checkpoint).__code__
_NOW = {"now", "utcnow", "today"}


@dataclass
class Habits:
    """What a forward was seen to do.

    Args:
        clocks: names of what it asked for the time, for the system's randomness or for files.
        recomputes: whether it used ``torch.utils.checkpoint``.
        refused: what it depends on or changes beside tensors, for a message; None if nothing.

    """

    clocks: set[str] = field(default_factory=set)
    recomputes: bool = False
    refused: str | None = None


def habits_of(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> Habits:
    """Call a forward three times from the same buffers and random numbers, and watch it.

    What it keeps from the first call on, and changes in none that follows, is a cache.

    All is as before afterwards, but for weights that the forward writes into.
    """
    habits = Habits()
    habits.refused = _impurity(model, run, inputs, habits)
    return habits


def recomputes(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> bool:
    """Whether one call uses ``torch.utils.checkpoint``; all is as before afterwards."""
    habits = Habits()
    with untouched(model), torch.enable_grad(), _watched(habits):
        run(copy_of(inputs))
    return habits.recomputes


def _impurity(
    model: nn.Module, run: Callable[[Any], Any], inputs: Any, habits: Habits
) -> str | None:
    weights = _digests(model)
    trained = {name: one.requires_grad for name, one in model.named_parameters()}
    with untouched(model), torch.enable_grad():
        with tensors_untouched(model), _watched(habits):
            calls = [_called(run, inputs)]  # fills caches, which is no habit
        python = PythonState(model)
        changed = []
        for _ in range(2):
            with tensors_untouched(model), _watched(habits):
                calls.append(_called(run, inputs))
            changed += python.changed()
        changed += [
            f"{name}.requires_grad"
            for name, one in model.named_parameters()
            if trained.get(name) != one.requires_grad
        ]
    if changed:
        names = ", ".join(f"'{name}'" for name in list(dict.fromkeys(changed))[:_SHOWN])
        return f"the forward changes {names}, which a graph keeps as it is: make it a buffer"
    written = [name for name, digest in _digests(model).items() if digest != weights[name]]
    if written:
        return f"the forward writes into the parameter '{written[0]}': do it in the optimizer"
    if habits.clocks:
        asked = ", ".join(sorted(habits.clocks))
        return f"the forward asks for {asked}: give it what it needs as an input"
    first, *later = calls
    if drawn := next((call.drawn for call in calls if call.drawn), None):
        return f"the forward draws from {drawn} by itself: use torch's functions in it"
    for call in later:
        is_same = len(first.outputs) == len(call.outputs) and torch.equal(first.draws, call.draws)
        if not is_same or not all(map(_is_same, first.outputs, call.outputs)):
            return "the forward depends on earlier calls, which a graph does not: use buffers"
    return None


class _Call(NamedTuple):
    """What one call gave, torch's generator after it, and which other library it drew from."""

    outputs: list[torch.Tensor]
    draws: torch.Tensor
    drawn: str | None


def _called(run: Callable[[Any], Any], inputs: Any) -> _Call:
    seed_all()
    python, numpy = random.getstate(), repr(np.random.get_state())
    outputs = [tensor.detach().clone() for tensor in tensors_in(run(copy_of(inputs)))]
    drawn = "Python's random" if random.getstate() != python else None
    drawn = "numpy" if repr(np.random.get_state()) != numpy else drawn
    return _Call(outputs, torch.get_rng_state(), drawn)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return is_close(one, other, 0.0, ROUNDINGS)


def _digests(model: nn.Module) -> dict[str, tuple[int, str]]:
    """Memory and sums of parameters, but of those that embeddings renormalise (``max_norm``)."""
    return {
        f"{name}.{key}" if name else key: (one.data_ptr(), repr(one.detach().sum().tolist()))
        for name, module in model.named_modules()
        if getattr(module, "max_norm", None) is None
        for key, one in module.named_parameters(recurse=False)
    }


@contextmanager
def _watched(habits: Habits) -> Iterator[None]:
    """Note what the user's own code, and what it calls, does within this context."""

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            habits.recomputes |= frame.f_code is _CHECKPOINT
        elif event == "c_call" and _is_clock(function) and is_own(Path(frame.f_code.co_filename)):
            habits.clocks.add(f"{function.__name__}()")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def _is_clock(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    is_now = owner in (datetime.datetime, datetime.date) and function.__name__ in _NOW
    return is_now or any(function is clock for clock in _CLOCKS)
