"""Predictions: what was simulated, how long that takes, and which plan it prefers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elbowroom.planning.pipeline.plan import plan_data_parallel, plan_on_levels
from elbowroom.planning.pipeline.prediction import alternatives, fastest, predict, with_prediction
from elbowroom.plans.pipeline import Level, PipelineOptions
from tests.planning.pipeline.pipelines import TEN_GBIT, chain, profile

EVEN = chain([(0.3, 10**8, 10**6)] * 4)
"""0.16 s of transfer between any two."""


def flat(num_workers: int) -> tuple[Level, ...]:
    return (Level(num_workers, TEN_GBIT),)


@pytest.mark.parametrize(("depth", "seconds"), [(1, (0.6 + 0.16 + 0.6) / 2), (2, 0.6)])
def test_transfers_hide_at_depth_2(depth: int, seconds: float) -> None:
    """Two stages of 0.6 s: the loop of the papers' two minibatches has the transfers in it."""
    plan = plan_on_levels(EVEN, flat(2), PipelineOptions(straight=True, depth=depth))
    prediction = predict(plan, EVEN)
    assert prediction is not None
    assert prediction.seconds == pytest.approx(seconds, rel=5e-3)
    assert prediction.idle == pytest.approx((1 - 0.6 / seconds,) * 2, abs=5e-3)
    assert prediction.timeline.steady_seconds == prediction.seconds
    assert plan.simulated_seconds is None
    assert with_prediction(plan, prediction).simulated_seconds == prediction.seconds


def test_memory_is_simulated_as_planned() -> None:
    plan = plan_on_levels(EVEN, flat(4), PipelineOptions(straight=True, depth=2))
    prediction = predict(plan, EVEN)
    assert prediction is not None
    assert prediction.timeline.peak_bytes == tuple(stage.memory_bytes for stage in plan.stages)


def test_long_pipes_are_not_simulated() -> None:
    layers = chain([(1.0, 1, 1)] * 64)
    plan = plan_on_levels(layers, flat(64), PipelineOptions(straight=True))
    assert predict(plan, layers) is None
    assert with_prediction(plan, None).simulated_seconds is None


def test_layers_without_time() -> None:
    layers = chain([(0.0, 5, 7)] * 2)
    prediction = predict(plan_on_levels(layers, flat(1)), layers)
    assert prediction is not None
    assert (prediction.seconds, prediction.idle) == (0.0, (0.0,))


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_all_layers_on_all_workers(sizes: tuple[int, ...]) -> None:
    levels = tuple(Level(size, TEN_GBIT) for size in sizes)
    plan = plan_data_parallel(EVEN, levels)
    assert plan.replicas == (4,)
    assert plan.seconds == pytest.approx(plan.data_parallel.seconds)


def test_alternatives() -> None:
    """The best of this chain is straight; data parallel training is the same at any depth."""
    heavy = chain([(0.3, 10**6, 10**9)] * 4)
    plan = plan_on_levels(heavy, flat(4))
    shown = [(str(other), other.options.depth) for other in alternatives(plan, heavy)]
    assert shown == [("1-1-1-1", 1), ("4", 1), ("1-1-1-1", 2)]
    assert alternatives(plan, heavy)[0] is plan


def test_alternatives_fit_in_memory() -> None:
    limit = plan_on_levels(EVEN, flat(2), PipelineOptions(straight=True)).stages[0].memory_bytes
    tight = PipelineOptions(straight=True, memory_limit_bytes=limit)
    found = alternatives(plan_on_levels(EVEN, flat(2), tight), EVEN)
    assert all(stage.memory_bytes <= limit for plan in found for stage in plan.stages)


def test_the_fastest() -> None:
    plan = plan_on_levels(EVEN, flat(2), PipelineOptions(straight=True))
    slow, equal, fast = (replace(plan, simulated_seconds=x) for x in (1.0, 0.995, 0.9))
    assert fastest((slow, equal)) is slow
    assert fastest((slow, equal, fast)) is fast
    assert fastest((plan, slow)) is slow
    assert fastest((slow, plan)) is slow


@pytest.mark.parametrize("name", ["gnmt", "vgg16"])
def test_the_authors_profiles(name: str) -> None:
    """Straight gnmt is as fast as planned at depth 2 alone; 3-1 of vgg16 needs none."""
    graph = profile(name)
    plans = alternatives(plan_on_levels(graph, flat(4)), graph)
    best = fastest(tuple(with_prediction(plan, predict(plan, graph)) for plan in plans))
    expected = {"gnmt": ("1-1-1-1", 2), "vgg16": ("3-1", 1)}
    assert (str(best), best.options.depth) == expected[name]
    assert best.simulated_seconds == pytest.approx(best.seconds, rel=5e-3)
