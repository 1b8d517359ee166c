"""Models as people write them: traced, each computes what it does itself, or is refused by name.

``tests/data/training`` has the scripts. What they are compared with is the model, called again and
again as a plain loop would call it.
"""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
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


class Odd(nn.Module):
    """A forward with any of the habits that a graph may not see."""

    def __init__(self, habits: set[str]) -> None:
        super().__init__()
        self.habits = habits
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.calls, self.scale, self.last = 0, 1.0, None

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
        return self.outer(y)


HABITS = (
    *("counter", "logged counter", "python random", "numpy random", "state", "cache", "flag"),
    *("buffer", "dropout", "rate", "no grad"),
)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.sampled_from(HABITS), max_size=3))
def test_equal_to_the_plain_loop_or_refused(habits: set[str]) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 8), torch.randn(6, 3)) for _ in range(8)]
    must_refuse = habits & {"counter", "python random", "numpy random", "state", "rate"}
    try:
        assert same_as_plain(Odd(habits).train(), batches, nn.functional.mse_loss)
        assert not must_refuse
    except UntraceableModelError as error:
        assert habits - {"flag", "buffer", "dropout", "cache"}, error
