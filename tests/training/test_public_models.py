"""Models as people write them: traced, each computes what it does itself, or is refused by name.

``tests/data/training`` has the scripts. What they are compared with is the model, called again and
again as a plain loop would call it.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import UntraceableModelError
from elbowroom.pipeline.split import split
from elbowroom.training.layers import trace_model
from elbowroom.training.outcome import in_training
from elbowroom.training.script import load_script
from elbowroom.training.tracing import called, find_graph
from tests.pipeline.models import plan_of

SCRIPTS = Path(__file__).parents[1] / "data" / "training"


def losses(run: Any, batches: list[Any], loss_fn: Any, model: nn.Module) -> list[float]:
    """Losses of plain SGD on what ``run`` gives, with the same random numbers each time."""
    torch.manual_seed(1)
    random.seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for inputs, targets in batches:
        loss = loss_fn(run(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def same_as_plain(model: nn.Module, batches: list[Any], loss_fn: Any) -> bool:
    """Whether a graph trains as the model does. Raises UntraceableModelError if it is refused."""
    plain = copy.deepcopy(model)
    graph = find_graph(model, batches[0][0])
    expected = losses(partial(called, plain), batches, loss_fn, plain)

    def run(inputs: Any) -> Any:
        found = graph.run(inputs)
        return found if graph.result is None else pytree.tree_unflatten(found, graph.result)

    assert losses(run, batches, loss_fn, model) == pytest.approx(expected, rel=1e-4)
    for one, other in zip(plain.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    return True


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("c10_lstm_stateful", "earlier calls"),
        ("c14_layerdrop", "Python's random"),
        ("c15_counter", "'step'"),
    ],
)
def test_what_depends_on_python_is_refused_by_name(name: str, words: str) -> None:
    script = load_script(SCRIPTS / f"{name}.py")
    generator = torch.Generator().manual_seed(0)
    model = in_training(script.make_model(0))
    with pytest.raises(UntraceableModelError) as refused:
        trace_model(model, script.make_batch(generator)[0])
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["c17_frozen_bn_eval", "c58_vq", "c83_ema_late", "c16_frozen"])
def test_scripts_that_train_as_plain(name: str) -> None:
    script = load_script(SCRIPTS / f"{name}.py")
    generator = torch.Generator().manual_seed(0)
    batches = [script.make_batch(generator) for _ in range(6)]
    assert same_as_plain(in_training(script.make_model(0)), batches, script.loss_fn)


class Masked(nn.Module):
    """What it reads cannot be written into as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 3)
        self.mask = torch.tensor([1.0, 0.0, 1.0]).expand(6, 3)
        self.register_buffer("shift", torch.tensor([[1.0], [2.0]]).repeat(3, 1).expand(6, 3))
        self.factors = np.broadcast_to(np.float32(0.5), (3,))
        with torch.inference_mode():
            self.loaded = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.mask * float(self.factors[0]) + self.shift


def test_what_cannot_be_written_into_is_read_as_it_is() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 8), torch.randn(6, 3)) for _ in range(4)]
    assert same_as_plain(Masked(), batches, nn.functional.mse_loss)


@pytest.mark.parametrize("name", ["c58_vq", "c83_ema_late"])
def test_what_is_written_into_a_buffer_stays_with_it(name: str) -> None:
    """All that reads or writes the buffer is tied, so that no plan puts it into two stages."""
    script = load_script(SCRIPTS / f"{name}.py")
    model = in_training(script.make_model(0))
    traced = trace_model(model, script.make_batch(torch.Generator().manual_seed(0))[0])
    tied = {one.name: set(one.layers) for one in traced.tied}
    for buffer in dict(model.named_buffers()):
        writers = {layer.name for layer in traced.layers if buffer in layer.state}
        assert any("add_" in name or "copy_" in name for name in writers), buffer
        assert tied[buffer] == writers


def test_norms_that_are_frozen_stay_so() -> None:
    script = load_script(SCRIPTS / "c17_frozen_bn_eval.py")
    model = in_training(script.make_model(0))
    generator = torch.Generator().manual_seed(0)
    traced = trace_model(model, script.make_batch(generator)[0])
    names = [layer.name for layer in traced.layers]
    stages = split(traced, plan_of([names[:4], names[4:]]))
    assert [m.training for s in stages for m in s.modules() if isinstance(m, nn.BatchNorm2d)] == [
        False,
        False,
    ]


SEEN = {"calls": 0}
CALLS = 0


def late(calls: int) -> int:
    """A factor that changes only after more calls than are compared."""
    return 2 if calls > 6 else 1


class Odd(nn.Module):
    """A forward with any of the habits that a graph may not see."""

    counted = 0

    def __init__(self, habits: set[str]) -> None:
        super().__init__()
        self.habits = habits
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.scale, self.last = 0, 1.0, None
        self.kept, self.past, self.ema = {"calls": 0}, [0], torch.zeros(8)
        self.config = SimpleNamespace(calls=0)
        if "iterator" in habits:
            self.factors = itertools.cycle([1] * 6 + [2])
        self.numbers, self.noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self.more = nn.ModuleList([nn.Linear(8, 8)])
        hooked = [0]

        def hook(*given: Any) -> Any:
            hooked[0] += 1
            return given[-1] * late(hooked[0])

        if "hook" in habits:
            self.inner.register_forward_hook(hook)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.inner(x))
        if "counter" in self.habits:
            self.calls += 1
            y = y * self.calls
        if "logged counter" in self.habits:
            self.calls += 1
        if "python random" in self.habits and random.random() < 0.01:
            y = y * 0
        if "numpy random" in self.habits:
            y = y * float(np.random.rand() > 0.01)
        if "state" in self.habits:
            y = y if self.last is None else y + self.last
            self.last = y.detach().mean(0)
        if "cache" in self.habits:
            self.last = y.detach()
        if "flag" in self.habits and self.training:
            y = y + 1
        if "buffer" in self.habits:
            y = y - self.mean
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        if "dropout" in self.habits:
            y = nn.functional.dropout(y, 0.5, self.training)
        if "rate" in self.habits:
            self.scale = self.scale * 0.9
            y = y * self.scale
        if "no grad" in self.habits:
            with torch.no_grad():
                y = y + self.inner(x)
        return self.outer(self.more_habits(y))

    def counted_by_default(self, calls: list[int] = [0]) -> int:  # noqa: B006
        calls[0] += 1
        return calls[0]

    def more_habits(self, y: torch.Tensor) -> torch.Tensor:
        global CALLS
        if "dict" in self.habits:
            self.kept["calls"] += 1
            y = y * late(self.kept["calls"])
        if "list" in self.habits:
            self.past.append(self.past[-1] + 1)
            y = y * late(self.past[-1])
        if "object" in self.habits:
            self.config.calls += 1
            y = y * late(self.config.calls)
        if "class" in self.habits:
            type(self).counted += 1
            y = y * late(self.counted)
        if "global" in self.habits:
            CALLS += 1
            y = y * late(CALLS)
        if "global dict" in self.habits:
            SEEN["calls"] += 1
            y = y * late(SEEN["calls"])
        if "numpy generator" in self.habits:
            y = y * float(self.numbers.random() > 0.01)
        if "torch generator" in self.habits:
            y = y + torch.randn(8, generator=self.noise)
        if "clock" in self.habits:
            y = y * float(time.time() > 0)
        if "default" in self.habits:
            y = y * late(self.counted_by_default())
        if "iterator" in self.habits:
            y = y * next(self.factors)
        if "slow state" in self.habits:
            self.ema = 0.9999 * self.ema + 0.0001 * y.detach().mean(0)
            y = y - self.ema
        if "slow state in place" in self.habits:
            self.ema.mul_(0.9999).add_(y.detach().mean(0), alpha=0.0001)
            y = y - self.ema
        if "more layers" in self.habits and len(self.more) < 6:
            self.more.append(nn.Identity())
        if "weights" in self.habits:
            self.outer.weight.data.clamp_(-0.2, 0.2)
        if "freeze" in self.habits:
            self.outer.bias.requires_grad_(False)
        if "steps" in self.habits:
            self.steps += 1
            y = y * torch.where(self.steps > 3, 2.0, 1.0)
        if "grad flag" in self.habits and torch.is_grad_enabled():
            y = y + 1
        return y


HARMLESS = ("flag", "buffer", "dropout", "cache", "steps", "grad flag")
REFUSED = (
    *("counter", "python random", "numpy random", "state", "rate", "dict", "list", "object"),
    *("class", "global", "global dict", "numpy generator", "torch generator", "clock", "hook"),
    *(
        "default",
        "iterator",
        "slow state",
        "slow state in place",
        "more layers",
        "weights",
        "freeze",
    ),
)
HABITS = (*HARMLESS, *REFUSED, "logged counter", "no grad")


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(HABITS), max_size=3))
def test_equal_to_the_plain_loop_or_refused(habits: set[str]) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 8), torch.randn(6, 3)) for _ in range(8)]
    must_refuse = habits & {*REFUSED}
    try:
        assert same_as_plain(Odd(habits).train(), batches, nn.functional.mse_loss)
        assert not must_refuse
    except UntraceableModelError as error:
        assert habits - {*HARMLESS}, error


@pytest.mark.parametrize("habit", REFUSED)
def test_each_habit_is_refused_also_within_a_block(habit: str) -> None:
    """And leaves no trace: what was counted is as before."""
    torch.manual_seed(0)
    before = (dict(SEEN), CALLS, Odd.counted)
    model = nn.Sequential(Odd({habit}), nn.ReLU()).train()
    with pytest.raises(UntraceableModelError, match="the forward"):
        find_graph(model, torch.randn(6, 8))
    block = model[0]
    assert (SEEN, CALLS, Odd.counted) == before
    assert (block.calls, block.kept, block.past) == (0, {"calls": 0}, [0])
    assert len(block.more) == 1
