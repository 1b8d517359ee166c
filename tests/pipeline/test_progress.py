"""The measured pace: of the first worker's own minibatches, while the pipe is full."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from elbowroom.pipeline import progress
from elbowroom.pipeline.progress import Progress
from elbowroom.training.microbatch import Microbatch

FILLING, FULL, SAVING = 5.0, 0.5, 60.0
WHOLE = (torch.zeros(8, 2), None)
CUT = [Microbatch(torch.zeros(rows, 2), None) for rows in (5, 1, 2)]


def make(
    monkeypatch: pytest.MonkeyPatch, replicas: int, warmup: int
) -> tuple[Progress, list[float]]:
    """The clock is what the list says."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    first = SimpleNamespace(replicas=replicas, warmup_forwards=warmup)
    pipeline = SimpleNamespace(plan=SimpleNamespace(stages=[first]))
    return Progress(cast("Any", pipeline)), clock


def feed(one: Progress, clock: list[float], count: int, replicas: int, warmup: int) -> None:
    for step in range(count):
        if step % replicas == 0:
            clock[0] += FILLING if step < warmup * replicas else FULL * replicas
        one.note(step, None, CUT if step % 2 else WHOLE)


@pytest.mark.parametrize(("replicas", "warmup"), [(1, 0), (1, 3), (2, 1), (3, 2)])
def test_filling_and_draining_do_not_count(
    monkeypatch: pytest.MonkeyPatch, replicas: int, warmup: int
) -> None:
    one, clock = make(monkeypatch, replicas, warmup)
    for count in (5, 30, 20):
        feed(one, clock, count, replicas, warmup)
        clock[0] += SAVING
        one.drained()
    assert one.steady_seconds == pytest.approx(FULL)
    assert one.samples_per_step == 8


def test_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    one, clock = make(monkeypatch, 1, 3)
    feed(one, clock, 5, 1, 3)
    assert one.steady_seconds is None
