"""Simulated pipelines: closed forms, laws, exact bytes, and the planner's own predictions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError, ScheduleError
from elbowroom.core.trace import write_trace
from elbowroom.planning.events import critical_path_seconds
from elbowroom.planning.pipeline.action_cost import (
    LINK_MODELS,
    LinkModel,
    PipelineCosts,
    StageCosts,
    plan_costs,
)
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import (
    PipelineTimeline,
    simulate_pipeline,
    simulate_pipeline_plan,
)
from elbowroom.plans.pipeline import Level, Overlap, PipelineOptions, Sync
from elbowroom.plans.pipeline_actions import Backward, Forward, Schedule
from elbowroom.plans.pipeline_schedule import Kind
from tests.examples import examples
from tests.planning.pipeline.pipelines import chain
from tests.planning.pipeline.schedules import schedules

NO_LIMIT = (Level(64, 1e30),)
SECONDS = st.integers(1, 9).map(lambda number: number / 8)
"""Sums are exact."""


TEN = (Level(64, 10.0),)


def links_of(bandwidth: float) -> tuple[Level, ...]:
    return (Level(64, bandwidth),)


def stage(seconds: float, crossing_bytes: int = 0, parameter_bytes: int = 0) -> StageCosts:
    """A third forward."""
    return StageCosts(seconds / 3, seconds * 2 / 3, parameter_bytes, 0, crossing_bytes)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 9))
def test_one_stage_takes_what_it_computes(
    forward: float, backward: float, update: float, num_minibatches: int
) -> None:
    costs = PipelineCosts((StageCosts(forward, backward, update_seconds=update),), NO_LIMIT)
    timeline = simulate_pipeline(plan_schedule((1,), num_minibatches), costs)
    assert timeline.seconds == pytest.approx(num_minibatches * (forward + backward + update))
    assert timeline.steady_seconds == pytest.approx(forward + backward + update)
    assert timeline.bubbles == pytest.approx((0.0,))


@examples(40)
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=5))
def test_a_straight_pipe_is_as_fast_as_its_slowest_stage(parts: list[tuple[float, float]]) -> None:
    costs = PipelineCosts(tuple(StageCosts(*part) for part in parts), NO_LIMIT)
    timeline = simulate_pipeline(plan_schedule((1,) * len(parts), 12 * len(parts)), costs)
    assert timeline.steady_seconds == pytest.approx(max(map(sum, parts)), rel=1e-2)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b-flush"])
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), SECONDS, SECONDS)
def test_bubble_of_a_flushed_pipe(
    kind: Kind, n: int, m: int, num_flushes: int, forward: float, backward: float
) -> None:
    """(n-1) / (m+n-1) for n equal stages and m microbatches, in either order (GPipe, 2.3)."""
    costs = PipelineCosts((StageCosts(forward, backward),) * n, NO_LIMIT)
    timeline = simulate_pipeline(plan_schedule((1,) * n, m * num_flushes, kind, m), costs)
    assert timeline.bubbles == pytest.approx(((n - 1) / (m + n - 1),) * n)
    assert timeline.seconds == pytest.approx(num_flushes * (m + n - 1) * (forward + backward))


@pytest.mark.parametrize("sync", ["ps", "allreduce"])
@pytest.mark.parametrize("overlap", ["max", "sum"])
@pytest.mark.parametrize("bandwidth", [10.0, 1000.0])
def test_data_parallel(sync: Sync, overlap: Overlap, bandwidth: float) -> None:
    """A round of r minibatches is a forward and a backward with c (r-1)/r w / B beside it."""
    options, replicas, weights = PipelineOptions(sync, overlap), 4, 100
    stages = (StageCosts(1.0, 2.0, weights),)
    costs = PipelineCosts(stages, links_of(bandwidth), (), options)
    timeline = simulate_pipeline(plan_schedule((replicas,), 40), costs)
    moved = {"ps": 4, "allreduce": 2}[sync] * (replicas - 1) / replicas * weights / bandwidth
    a_round = 1.0 + (max(2.0, moved) if overlap == "max" else 2.0 + moved)
    assert timeline.steady_seconds == pytest.approx(a_round / replicas)
    assert timeline.seconds == pytest.approx(10 * a_round)
    assert timeline.sync_bytes == (10 * options.sync_factor * (replicas - 1) * weights,)


def test_transfers_are_hidden_only_by_minibatches_in_flight() -> None:
    """Two stages of 3 s, 1 s of transfer each way: 2 in flight share 3 + 1 + 3 + 1 s."""
    costs = PipelineCosts((stage(3.0, 10), stage(3.0)), TEN)
    timeline = simulate_pipeline(plan_schedule((1, 1), 24), costs)
    assert timeline.steady_seconds == pytest.approx((3 + 1 + 3 + 1) / 2)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Schedule, tuple[StageCosts, ...]]:
    schedule = draw(schedules())
    sizes = st.integers(0, 5)
    stages = tuple(
        StageCosts(draw(SECONDS), draw(SECONDS), draw(sizes), draw(sizes), draw(sizes))
        for _ in schedule.replicas
    )
    return schedule, stages


@examples(60)
@given(runs(), st.sampled_from(LINK_MODELS), st.booleans(), st.sampled_from([1.0, 8.0]))
def test_laws(
    run: tuple[Schedule, tuple[StageCosts, ...]],
    links: LinkModel,
    overlap_compute: bool,
    bandwidth: float,
) -> None:
    schedule, stages = run
    costs = PipelineCosts(
        stages, links_of(bandwidth), (), PipelineOptions(), links, overlap_compute
    )
    timeline = simulate_pipeline(schedule, costs)
    check_bytes(schedule, costs, timeline)
    slack = 1e-6 * timeline.seconds
    assert timeline.seconds >= critical_path_seconds(timeline.timeline.tasks) - slack
    for worker, share in enumerate(timeline.bubbles):
        of_stage = stages[schedule.stages[worker]]
        own = sum(str(action)[0] == "F" for action in schedule.actions[worker])
        seconds = own * (of_stage.forward_seconds + of_stage.backward_seconds)
        assert (1 - share) * timeline.seconds == pytest.approx(seconds)
        assert -1e-9 <= share <= 1


def check_bytes(schedule: Schedule, costs: PipelineCosts, timeline: PipelineTimeline) -> None:
    num_minibatches, factor = schedule.num_minibatches, costs.options.sync_factor
    for number, of_stage in enumerate(costs.stages):
        is_last = number == schedule.num_stages - 1
        crossing = 0 if is_last else 2 * num_minibatches * of_stage.crossing_bytes
        assert timeline.cut_bytes[number] == crossing
        workers = schedule.workers(number)
        reduces = sum(str(action)[0] == "M" for action in schedule.actions[workers[0]])
        moved = factor * (len(workers) - 1) * of_stage.parameter_bytes
        assert timeline.sync_bytes[number] == reduces * moved
    assert sum(timeline.link_bytes.values()) == sum(timeline.cut_bytes)
    for (source, target), moved in timeline.link_bytes.items():
        cut = min(schedule.stages[source], schedule.stages[target])
        both = [schedule.workers(schedule.stages[worker]) for worker in (source, target)]
        shared = sum(
            both[0][i % len(both[0])] == source and both[1][i % len(both[1])] == target
            for i in range(num_minibatches)
        )
        assert moved == shared * costs.stages[cut].crossing_bytes


@examples(30)
@given(runs())
def test_less_room_is_never_faster(run: tuple[Schedule, tuple[StageCosts, ...]]) -> None:
    """Up to what rates that change halfway may do: links without limit are the floor."""
    schedule, stages = run
    floor = simulate_pipeline(schedule, PipelineCosts(stages, NO_LIMIT)).seconds
    for links in LINK_MODELS:
        limited = simulate_pipeline(
            schedule, PipelineCosts(stages, links_of(2.0), links=links)
        ).seconds
        assert limited >= floor * (1 - 1e-9)


def test_transfers_that_take_compute() -> None:
    """One minibatch, two stages: nothing to overlap with, nothing lost; many: the sum of all."""
    stages = (stage(3.0, 10), stage(3.0))
    beside = PipelineCosts(stages, TEN)
    instead = PipelineCosts(stages, TEN, overlap_compute=False)
    one, many = plan_schedule((1, 1), 1), plan_schedule((1, 1), 24)
    assert simulate_pipeline(one, instead).seconds == simulate_pipeline(one, beside).seconds
    timeline = simulate_pipeline(many, instead)
    assert timeline.steady_seconds >= 3 + 1 + 1 - 1e-9
    assert timeline.steady_seconds > simulate_pipeline(many, beside).steady_seconds


def test_stages_of_a_node_share_its_link() -> None:
    """Two stages on each of three nodes agree on 5 bytes of weights in all over 10 bytes/s."""
    levels = (Level(2, 1e30), Level(3, 10.0))
    stages = (StageCosts(0.01, 0.02, 2), StageCosts(0.01, 0.02, 3))
    moved = 4 * (3 - 1) / 3 * (2 + 3) / 10
    for links in LINK_MODELS:
        costs = PipelineCosts(stages, levels, ((3, 1), (3, 1)), links=links)
        timeline = simulate_pipeline(plan_schedule((3, 3), 72), costs)
        assert timeline.steady_seconds >= moved / 3 * (1 - 1e-9)
        assert timeline.level_bytes == (0, 72 // 3 * 4 * (3 - 1) * (2 + 3))


def test_trace(tmp_path: Path) -> None:
    costs = PipelineCosts((stage(3.0, 10, 20), stage(3.0, 0, 30)), TEN)
    timeline = simulate_pipeline(plan_schedule((2, 1), 6), costs)
    spans = list(timeline.spans())
    for worker in range(3):
        process = f"worker {worker}"
        own = [x for x in spans if (x.process, x.track) == (process, "compute")]
        assert all(one.end <= two.start + 1e-9 for one, two in pairwise(own))
        names = [x.name for x in own]
        words = {Forward: "forward", Backward: "backward"}
        done = timeline.schedule.actions[worker]
        assert names == [f"{words[type(x)]} {x.minibatch}" for x in done if type(x) in words]
    assert sum(x.track == "reduce" for x in spans) == 3
    sends = [x for x in spans if x.track.startswith("to worker")]
    assert len(sends) == 2 * 6
    assert all(x.end - x.start >= 1 - 1e-9 for x in sends)
    assert all(x.track == f"to worker {x.name[-1]}" for x in sends)
    write_trace(tmp_path / "t.json", spans)
    drawn = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in drawn) == len(spans)


def test_refuses() -> None:
    costs, graph = PipelineCosts((stage(1.0),), TEN), chain([(1.0, 1, 1), (1.0, 1, 1)])
    with pytest.raises(InputError, match="costs of 1 stages for 2"):
        simulate_pipeline(plan_schedule((1, 1), 2), costs)
    with pytest.raises(InputError, match="not one of worker, cut"):
        PipelineCosts((stage(1.0),), TEN, links="bus")  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="update nothing"):
        simulate_pipeline(Schedule.parse("1 x 1\nF0.0 B0.0"), costs)
    plan = plan_on_levels(graph, (Level(1, 1e9),))
    with pytest.raises(InputError, match="costs of 1 stages for 2"):
        simulate_pipeline_plan(plan, graph, plan_schedule((1, 1), 2))
    with pytest.raises(InputError, match="no layer 'n1'"):
        plan_costs(plan, chain([(1.0, 1, 1)]))
    with pytest.raises(InputError, match=r"costs of \(\(1,\),\) replicas for \(2,\)"):
        simulate_pipeline_plan(plan, graph, plan_schedule((2,), 2))
