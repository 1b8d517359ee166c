"""Times and memory of one step: what is measured between ticks is what the plan predicts."""

from __future__ import annotations

import random

import pytest

from elbowroom.core.trace import Span
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.link import Link
from elbowroom.swap.trace import StepTrace
from tests.swap.models import MAKERS, Case, make
from tests.swap.steps import needed_meter, plain_step, profiled, random_plan, swapped_step

CLOSE_BYTES = 4096


def traced(case: Case, link: Link, plan: SwapPlan) -> tuple[StepTrace, list[Span]]:
    trace = StepTrace(needed_meter())
    with trace.recording():
        swapped_step(case, link, plan, observer=trace)
    return trace, list(trace.spans())


@pytest.mark.parametrize("name", MAKERS)
def test_memory_between_ticks_is_as_predicted(link: Link, name: str) -> None:
    case, rng = make(name), random.Random(name)
    plain_step(case)
    profile = profiled(case, link)
    peaks: list[tuple[int, int]] = []
    for _ in range(4):
        plan = random_plan(profile, rng)
        trace, _ = traced(case, link, plan)
        assert trace.tick_peaks is not None
        # Around the step, where this test copies weights, it knows nothing of them.
        pairs = list(zip(plan.tick_peaks, trace.tick_peaks, strict=True))[1:-1]
        start = pairs[0][1] - pairs[0][0]
        peaks += [(predicted + start, measured) for predicted, measured in pairs]
    assert all(abs(predicted - measured) <= CLOSE_BYTES for predicted, measured in peaks)
    assert sum(predicted == measured for predicted, measured in peaks) >= 0.98 * len(peaks)


def test_spans_cover_the_step_and_its_copies(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    plan = random_plan(profiled(case, link), random.Random(5))
    trace, spans = traced(case, link, plan)
    by_track = {track: [s for s in spans if s.track == track] for track in ("compute", "out", "in")}
    assert len(by_track["compute"]) == plan.num_ticks + 1
    copies = [span.name for span in spans if span.track in ("out", "in")]
    assert sorted(copies) == sorted(map(str, plan.transfers))
    assert all(trace.begin <= span.start <= span.end <= trace.end for span in spans)
    starts = [span.start for span in by_track["compute"]]
    assert starts == sorted(starts)
    assert trace.tick_seconds == tuple(sorted(trace.tick_seconds))
