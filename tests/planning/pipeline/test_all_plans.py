"""Every plan of small pipelines against trying all of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_graph import Edge, Layer, LayerGraph, LayerMemory
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan
from tests.examples import examples
from tests.planning.pipeline.pipelines import (
    NaivePlan,
    NaiveStage,
    chain,
    downsets,
    flat,
    graph,
    naive_plan,
)

few = st.integers(1, 4)
costs = st.tuples(
    few.map(lambda number: number / 1000),
    few.map(lambda number: number * 10**6),
    st.integers(0, 4).map(lambda number: number * 10**6),
)
"""Few values, so that many plans tie."""
chains = st.lists(costs, min_size=1, max_size=12).map(chain)
option_sets = st.builds(
    PipelineOptions,
    sync=st.sampled_from(["ps", "allreduce"]),
    overlap=st.sampled_from(["max", "sum"]),
    memory_limit_bytes=st.none() | st.integers(5, 120).map(lambda number: number * 10**6),
    straight=st.booleans(),
    fewer_workers=st.booleans(),
    depth=st.integers(1, 3),
    optimizer=st.sampled_from([None, "sgd", "momentum", "adamw"]),
    semantics=st.sampled_from(["stash", "predict"]),
    swap_bandwidth=st.sampled_from([None, None, 1e9]),
)
bandwidths = st.sampled_from([1e8, 1e9, 4e9, 1e12])


@st.composite
def measured(draw: st.DrawFn, graphs: st.SearchStrategy[LayerGraph]) -> LayerGraph:
    """With facts about memory, of the same few values; some layers give integers."""
    size = st.integers(0, 4).map(lambda number: number * 10**6)
    needs = st.builds(LayerMemory, size, size, size, size, size)
    layers = draw(graphs)
    measured = tuple(
        replace(layer, memory=draw(needs), gradient_bytes=draw(st.sampled_from([None, 0])))
        for layer in layers.layers
    )
    return replace(layers, layers=measured)


@st.composite
def branching(draw: st.DrawFn, most: int = 12, most_cuts: int = 24) -> LayerGraph:
    layers = draw(st.lists(costs, min_size=2, max_size=most))
    edges = {(draw(st.integers(max(0, i - 3), i - 1)), i) for i in range(1, len(layers))}
    edges |= {(i, j) for i, j in draw(st.sets(st.tuples(few, few))) if i < j < len(layers)}
    made = graph(layers, sorted(edges))
    assume(len(downsets(made)) <= most_cuts)
    names = st.sampled_from([layer.name for layer in made.layers])
    tied = draw(st.lists(st.lists(names, min_size=2, max_size=3, unique=True), max_size=2))
    return replace(made, tied=tuple(map(tuple, tied)))


@given(chains, st.integers(1, 5), bandwidths, option_sets)
def test_chains_against_all_plans(
    layers: LayerGraph, num_workers: int, bandwidth: float, options: PipelineOptions
) -> None:
    check_against_all_plans(layers, flat(num_workers, bandwidth), options)


@given(branching(), st.integers(1, 5), bandwidths, option_sets)
def test_branches_against_all_plans(
    layers: LayerGraph, num_workers: int, bandwidth: float, options: PipelineOptions
) -> None:
    check_against_all_plans(layers, flat(num_workers, bandwidth), options)


@given(
    branching(most=7, most_cuts=12),
    st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2), (2, 3)]),
    st.tuples(bandwidths, bandwidths),
    option_sets,
)
def test_two_levels_against_all_plans(
    layers: LayerGraph,
    sizes: tuple[int, int],
    speeds: tuple[float, float],
    options: PipelineOptions,
) -> None:
    levels = tuple(Level(size, speed) for size, speed in zip(sizes, speeds, strict=True))
    check_against_all_plans(layers, levels, options)


@given(measured(branching(most=10, most_cuts=18)), st.integers(1, 4), bandwidths, option_sets)
def test_measured_memory_against_all_plans(
    layers: LayerGraph, num_workers: int, bandwidth: float, options: PipelineOptions
) -> None:
    check_against_all_plans(layers, flat(num_workers, bandwidth), options)


@examples(50)
@given(measured(branching(most=6, most_cuts=10)), bandwidths, option_sets)
def test_measured_memory_on_two_levels(
    layers: LayerGraph, bandwidth: float, options: PipelineOptions
) -> None:
    check_against_all_plans(layers, (Level(2, 4 * bandwidth), Level(2, bandwidth)), options)


@examples(20)
@given(branching(most=5, most_cuts=8), bandwidths, option_sets)
def test_three_levels_against_all_plans(
    layers: LayerGraph, bandwidth: float, options: PipelineOptions
) -> None:
    levels = (Level(2, 4 * bandwidth), Level(2, 2 * bandwidth), Level(2, bandwidth))
    check_against_all_plans(layers, levels, options)


def check_against_all_plans(
    layers: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions
) -> None:
    expected = naive_plan(layers, levels, options)
    if expected is None:
        check_refused(layers, levels, options)
        return
    plan = plan_on_levels(layers, levels, options)
    assert plan.is_exact
    assert plan.seconds == pytest.approx(expected.seconds, rel=2e-9)
    assert plan.traffic[-1].num_bytes == pytest.approx(expected.num_bytes, abs=20)
    assert described(plan) == list(expected.stages)
    assert PipelinePlan.from_json(plan.to_json()) == plan


def described(plan: PipelinePlan) -> list[NaiveStage]:
    return [
        NaiveStage(
            frozenset(stage.layers),
            stage.replicas,
            stage.in_flight,
            stage.memory_bytes,
            stage.swapped_bytes,
        )
        for stage in plan.stages
    ]


def check_refused(layers: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions) -> None:
    """And what the message says to be enough is, but not a byte less."""
    with pytest.raises((MemoryPlanError, InputError)) as caught:
        plan_on_levels(layers, levels, options)
    if isinstance(caught.value, InputError):
        assert options.straight
        assert naive_plan(layers, levels, replace(options, memory_limit_bytes=None)) is None
        return
    found = re.search(r"\((\d+) bytes\)", str(caught.value))
    assert found is not None
    enough = int(found[1])
    assert naive_plan(layers, levels, replace(options, memory_limit_bytes=enough)) is not None
    assert naive_plan(layers, levels, replace(options, memory_limit_bytes=enough - 1)) is None
    swapping = replace(options, swap_bandwidth=options.swap_bandwidth or 1.0)
    advised = re.findall(r"--swap-bandwidth.*\((\d+) bytes\)", str(caught.value))
    helps = naive_plan(layers, levels, swapping) is not None
    assert bool(advised) == helps
    for text in advised:
        least = replace(swapping, memory_limit_bytes=int(text))
        assert naive_plan(layers, levels, least) is not None
        less = replace(swapping, memory_limit_bytes=int(text) - 1)
        assert naive_plan(layers, levels, less) is None


@examples(50)
@given(branching(most=8, most_cuts=12), st.data(), st.integers(1, 3), bandwidths)
def test_what_is_set_aside_costs_nothing(
    layers: LayerGraph, data: st.DataObject, num_workers: int, bandwidth: float
) -> None:
    """Free ends and sources, of which the naive planner tries every place.

    A stage of nothing else is a worker that idles, hence ``fewer_workers``.
    """
    added, edges = list(layers.layers), list(layers.edges)
    for number in range(data.draw(st.integers(0, 2))):
        added.append(Layer(f"end{number}", 0.0, 0.0, 10**6, 0))
        edges.append(Edge(data.draw(st.sampled_from(layers.layers)).name, f"end{number}"))
        added.append(Layer(f"source{number}", 0.0, 0.0, 0, 0))
        edges.append(Edge(f"source{number}", data.draw(st.sampled_from(layers.layers)).name))
    whole = LayerGraph(tuple(added), tuple(edges))
    assume(len(downsets(whole)) <= 40)
    options = PipelineOptions(fewer_workers=True)
    best: NaivePlan | None = naive_plan(whole, flat(num_workers, bandwidth), options)
    assert best is not None
    plan = plan_on_levels(whole, flat(num_workers, bandwidth), options)
    assert plan.seconds == pytest.approx(best.seconds, rel=2e-9)
    assert plan.traffic[0].num_bytes == best.num_bytes
