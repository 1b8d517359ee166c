"""Stages that swap what minibatches in flight have saved: memory, time, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_graph import Edge, Layer, LayerGraph, LayerMemory
from elbowroom.core.trace import Span
from elbowroom.planning.pipeline.action_cost import PipelineCosts, StageCosts, plan_costs
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pipeline.prediction import predict
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import PipelineTimeline, simulate_pipeline
from elbowroom.plans.pipeline import Level, Optimizer, PipelineOptions, PipelinePlan
from tests.examples import examples
from tests.planning.pipeline.pipelines import chain, flat
from tests.planning.pipeline.test_all_plans import branching, check_against_all_plans, measured

MB = 10**6
FAST, SLOW = 1e10, 4e9
NO_LIMIT = (Level(64, 1e30),)
FOUR = chain([(0.002, 4 * MB, 1000), (0.001, 1000, 1000)] * 4)
"""Four equal stages that little crosses between, 4 to 1 minibatches in flight."""
OWN = 4 * MB + 1000
"""What layers of a stage of ``FOUR`` keep."""
STRAIGHT = PipelineOptions(straight=True)

light = st.tuples(
    st.integers(1, 4).map(lambda number: number / 1000),
    st.integers(1, 4).map(lambda number: number * MB),
    st.integers(0, 4).map(lambda number: number * 10**5),
)
chains = st.lists(light, min_size=3, max_size=8).map(chain)
option_sets = st.builds(
    PipelineOptions,
    sync=st.just("allreduce"),
    fewer_workers=st.just(True),
    straight=st.sampled_from([True, True, False]),
    depth=st.integers(1, 3),
    optimizer=st.sampled_from([None, "adamw"]),
    semantics=st.sampled_from(["stash", "predict"]),
    swap_bandwidth=st.sampled_from([2e8, 2e9, 1e12]),
)


def too_little(
    layers: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions, share: float
) -> PipelineOptions:
    """The options with a part of the memory that the best plan of all needs."""
    free = plan_on_levels(layers, levels, options)
    most = max(stage.memory_bytes for stage in free.stages)
    return replace(options, memory_limit_bytes=int(most * share))


@pytest.mark.parametrize("sizes", [(3,), (4,), (2, 2)])
@given(chains, st.sampled_from([1e9, 1e10]), option_sets, st.floats(0.3, 0.99), st.booleans())
def test_chains_against_all_plans(
    sizes: tuple[int, ...],
    layers: LayerGraph,
    bandwidth: float,
    options: PipelineOptions,
    share: float,
    swaps: bool,
) -> None:
    """Also without a bandwidth to swap, for what a refusal advises."""
    levels = tuple(Level(size, bandwidth) for size in sizes)
    limited = too_little(layers, levels, options, share)
    swapping = limited if swaps else replace(limited, swap_bandwidth=None)
    check_against_all_plans(layers, levels, swapping)


@examples(200)
@given(measured(branching(most=8, most_cuts=12)), option_sets, st.floats(0.3, 0.99))
def test_measured_memory_against_all_plans(
    layers: LayerGraph, options: PipelineOptions, share: float
) -> None:
    levels = flat(3, 1e10)
    check_against_all_plans(layers, levels, too_little(layers, levels, options, share))


@given(chains, option_sets)
def test_what_fits_does_not_swap(layers: LayerGraph, options: PipelineOptions) -> None:
    levels = flat(4, 1e10)
    plan = plan_on_levels(layers, levels, replace(options, swap_bandwidth=None))
    most = max(stage.memory_bytes for stage in plan.stages)
    for limit in (None, most):
        again = plan_on_levels(layers, levels, replace(options, memory_limit_bytes=limit))
        assert again.stages == plan.stages


def test_only_what_layers_keep_is_swapped() -> None:
    """Not inputs, not what is received, not an output that no backward reads."""
    needs = LayerMemory(kept_bytes=5 * MB, loose_bytes=2 * MB)
    layers = [Layer("input", 0.0, 0.0, MB, 0, "Input", memory=LayerMemory(0))]
    layers += [Layer(f"n{i}", 0.001, 0.002, 3 * MB, MB, memory=needs) for i in range(4)]
    names = [layer.name for layer in layers]
    graph = LayerGraph(tuple(layers), tuple(map(Edge, names, names[1:])))
    kinds: list[tuple[Optimizer | None, int, int]] = [(None, 3, 3), ("adamw", 5, 5 + 2)]
    for optimizer, made, kept in kinds:
        options = replace(STRAIGHT, optimizer=optimizer)
        free = plan_on_levels(graph, flat(4, 1e12), options).stages
        limit = min(stage.memory_bytes for stage in free[:2]) - 1
        swapping = replace(options, memory_limit_bytes=limit, swap_bandwidth=FAST)
        plan = plan_on_levels(graph, flat(4, 1e12), swapping)
        assert [stage.swapped_bytes for stage in plan.stages] == [made * MB, made * MB, 0, 0]
        assert [stage.kept_bytes for stage in plan.stages[:2]] == [(kept + 1) * MB, (kept + 3) * MB]
        spared = [x.memory_bytes - y.memory_bytes for x, y in zip(free, plan.stages, strict=True)]
        assert spared == [2 * made * MB, made * MB, 0, 0]


def test_a_pipe_that_fits_only_by_swapping() -> None:
    """Stages with 1 and 2 in flight never swap; what is said to be enough is."""
    free = plan_on_levels(FOUR, flat(4, 1e9), STRAIGHT)
    assert [stage.in_flight for stage in free.stages] == [4, 3, 2, 1]
    need = [stage.memory_bytes for stage in free.stages]
    limited = replace(STRAIGHT, memory_limit_bytes=need[0] - OWN)
    with pytest.raises(MemoryPlanError) as caught:
        plan_on_levels(FOUR, flat(4, 1e9), limited)
    least, advised = map(int, re.findall(r"\((\d+) bytes\)", str(caught.value)))
    assert advised < need[0] - OWN < least <= need[0]
    swapping = replace(limited, swap_bandwidth=FAST)
    plan = plan_on_levels(FOUR, flat(4, 1e9), swapping)
    assert [stage.swapped_bytes for stage in plan.stages] == [OWN, OWN, 0, 0]
    swapped = [stage.memory_bytes for stage in plan.stages]
    assert swapped == [need[0] - 2 * OWN, need[1] - OWN, need[2], need[3]]
    tight = plan_on_levels(FOUR, flat(4, 1e9), replace(swapping, memory_limit_bytes=advised))
    assert max(stage.memory_bytes for stage in tight.stages) == advised
    with pytest.raises(MemoryPlanError) as caught:
        plan_on_levels(FOUR, flat(4, 1e9), replace(swapping, memory_limit_bytes=advised - 1))
    assert re.findall(r"\((\d+) bytes\)", str(caught.value)) == [str(advised)]


def test_fewer_workers_are_enough_with_swapping() -> None:
    """Without it only a plan that is slower fits: layers elsewhere, or replicas of all."""
    layers = chain([(0.003, 4 * MB, MB), (0.003, 4 * MB, MB), (0.003, MB, 40 * MB)] * 2)
    options = replace(STRAIGHT, fewer_workers=True, depth=2)
    free = plan_on_levels(layers, flat(4, 1e10), options)
    limit = max(stage.memory_bytes for stage in free.stages) - MB
    limited = replace(options, memory_limit_bytes=limit)
    swapping = plan_on_levels(layers, flat(4, 1e10), replace(limited, swap_bandwidth=1e12))
    assert swapping.seconds == free.seconds
    assert plan_on_levels(layers, flat(4, 1e10), limited).seconds > free.seconds


@examples(200)
@given(chains, option_sets, st.floats(0.4, 0.95), st.floats(1e8, 1e10), st.floats(1.0, 100.0))
def test_never_slower_at_more_bandwidth(
    layers: LayerGraph, options: PipelineOptions, share: float, bandwidth: float, more: float
) -> None:
    levels = flat(4, 1e10)
    limited = too_little(layers, levels, options, share)
    plans = []
    for rate in (bandwidth, bandwidth * more):
        try:
            plans.append(plan_on_levels(layers, levels, replace(limited, swap_bandwidth=rate)))
        except MemoryPlanError:
            assert not plans, "memory does not depend on the bandwidth"
    for plan in plans:
        check_floor(plan)
    if plans:
        slow, fast = plans
        assert fast.seconds <= slow.seconds * (1 + 1e-9)


def check_floor(plan: PipelinePlan) -> None:
    limit, bandwidth = plan.options.memory_limit_bytes, plan.options.swap_bandwidth
    assert limit is not None
    assert bandwidth is not None
    for stage in plan.stages:
        assert stage.memory_bytes <= limit
        assert bool(stage.swapped_bytes) == (stage.memory_bytes + stage.spared_bytes > limit)
        assert stage.seconds >= 2 * stage.swapped_bytes / bandwidth / stage.replicas * (1 - 1e-9)


def simulated(
    swapped_bytes: int, bandwidth: float, backward: float = 2.0, num: int = 24
) -> PipelineTimeline:
    """Three stages of which the first two could swap, and the first does."""
    first = StageCosts(1.0, backward, 1, 10, swapped_bytes=swapped_bytes)
    other = StageCosts(1.0, backward, 1, 10)
    options = PipelineOptions(swap_bandwidth=bandwidth)
    costs = PipelineCosts((first, other, other), NO_LIMIT, (), options)
    return simulate_pipeline(plan_schedule((1, 1, 1), num, depth=2), costs)


def test_a_fast_link_costs_nothing() -> None:
    timeline = simulated(8, 8.0)
    assert timeline.steady_seconds == pytest.approx(3.0)
    assert timeline.peak_bytes[0] == 5 * (1 + 10) - (5 - 2) * 8
    assert timeline.peak_bytes[1:] == (3 * (1 + 10), 1 + 10)


@pytest.mark.parametrize("copy", [2.5, 4.0])
def test_a_slow_link_is_the_pace(copy: float) -> None:
    """Out beside the forward (1 s), then in; both on one queue."""
    assert simulated(8, 8 / copy).steady_seconds == pytest.approx(2 * copy, rel=1e-2)


def test_copies_wait_and_are_waited_for() -> None:
    timeline, num = simulated(8, 8 / 2.5, num=12), 12
    spans = [span for span in timeline.spans() if span.process == "worker 0"]
    named = {span.name: span for span in spans}
    copies = [span for span in spans if span.track == "swap"]
    assert sum(span.name[0] == "O" for span in copies) == num
    assert sum(span.name[0] == "I" for span in copies) == num - 1  # the last forward's is there
    assert f"I0.{num - 1}" not in named
    assert all(span.end - span.start == pytest.approx(2.5) for span in copies)
    computed = [span for span in spans if span.track == "compute"]
    for before, after in pairwise(computed):
        check_order(before, after, named)


def check_order(before: Span, after: Span, named: dict[str, Span]) -> None:
    """Of two passes of a worker that follow each other."""
    number = before.name.split()[1]
    if before.name.startswith("backward") and f"I0.{number}" in named:
        assert named[f"I0.{number}"].start >= before.start - 1e-9
        assert after.start >= named[f"I0.{number}"].end - 1e-9
    if after.name.startswith("forward"):
        previous = int(after.name.split()[1]) - 1
        assert after.start >= named[f"O0.{previous}"].end - 1e-9


@examples(200)
@given(chains, option_sets, st.floats(0.4, 0.95))
def test_plans_simulated(layers: LayerGraph, options: PipelineOptions, share: float) -> None:
    """Memory as planned, and never less time than the links for swapping need."""
    limited = too_little(layers, flat(4, 1e10), options, share)
    try:
        plan = plan_on_levels(layers, flat(4, 1e10), limited)
    except MemoryPlanError:
        return
    prediction = predict(plan, layers)
    assert prediction is not None
    planned = [stage.memory_bytes for stage in plan.stages for _ in range(stage.replicas)]
    assert prediction.timeline.peak_bytes == tuple(planned)
    bandwidth = plan.options.swap_bandwidth
    assert bandwidth is not None
    for stage in plan.stages:
        floor = 2 * stage.swapped_bytes / bandwidth / stage.replicas
        assert prediction.seconds >= floor * (1 - 2e-2)


def test_what_compute_has_to_copy_itself() -> None:
    options = replace(STRAIGHT, memory_limit_bytes=10 * MB, swap_bandwidth=SLOW)
    plan = plan_on_levels(FOUR, flat(4, 1e12), options)
    schedule = plan_schedule(plan.replicas, 32)
    beside = simulate_pipeline(schedule, plan_costs(plan, FOUR))
    instead = simulate_pipeline(schedule, plan_costs(plan, FOUR, overlap_compute=False))
    copies = 2 * plan.stages[0].swapped_bytes / SLOW
    assert plan.stages[0].swapped_bytes == OWN
    assert beside.steady_seconds == pytest.approx(0.003, rel=1e-2)
    assert instead.steady_seconds == pytest.approx(0.003 + copies, rel=1e-2)


def test_no_time_without_a_bandwidth() -> None:
    with pytest.raises(InputError, match="swap_bandwidth"):
        PipelineCosts((StageCosts(1.0, 2.0, swapped_bytes=1),), NO_LIMIT)
