"""Swap plans for a budget: never over it, never slower than TFLMS's, near the optimum, in time."""

from __future__ import annotations

import random
import time
from statistics import mean

import pytest

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import SwapPlanner, plan_swap, plan_thresholds
from elbowroom.planning.swap.memory import peak_bytes
from elbowroom.planning.swap.timeline import SwapLink, simulate_swap
from elbowroom.plans.swap import SwapPlan
from tests.planning.swap.made_models import (
    MODELS,
    budget_at,
    gap_bandwidth,
    gpt_like,
    made_cases,
    random_profile,
    tangled_profile,
)
from tests.planning.swap.optimum import optimum
from tests.planning.swap.profiles import two_storages

PARTS = [part / 97 for part in range(98)]
POINTS = 0.1
"""How much slower than the optimum a step may be, as a part of its compute."""


def slowdown(plan: SwapPlan) -> float:
    return plan.seconds / plan.compute_seconds - 1


def check(plan: SwapPlan, profile: StepProfile, link: SwapLink, budget: int) -> None:
    assert peak_bytes(profile, plan.choices) == plan.peak_bytes <= budget
    assert simulate_swap(profile, plan, link).seconds == pytest.approx(plan.seconds, abs=1e-9)


@pytest.mark.parametrize(("budget", "swapped"), [(1160, [0]), (1169, [0]), (1170, [])])
def test_the_shortest_gaps_are_kept(budget: int, swapped: list[int]) -> None:
    plan = plan_swap(two_storages(), budget)
    assert [choice.storage for choice in plan.choices] == swapped
    assert plan.peak_bytes <= budget
    assert plan.out_bytes == plan.in_bytes == 100 * len(swapped)
    assert plan.compute_seconds == pytest.approx(1.1)


def test_one_byte_below_the_floor_is_refused_by_numbers() -> None:
    with pytest.raises(MemoryPlanError, match=r"1160 bytes.*1159 bytes.* 1\.1 times smaller"):
        plan_swap(two_storages(), 1159)
    with pytest.raises(MemoryPlanError, match=r"1160 bytes.*1000 bytes.*optimizer"):
        plan_swap(two_storages(), 1000)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_is_never_slower_than_the_papers(name: str) -> None:
    ours, theirs = [], []
    for _, profile, _, _, link, budget in made_cases(name):
        plan, rule = plan_swap(profile, budget, link), plan_thresholds(profile, budget, link)
        check(plan, profile, link, budget)
        check(rule, profile, link, budget)
        assert plan.seconds <= rule.seconds
        ours.append(slowdown(plan))
        theirs.append(slowdown(rule))
    assert mean(ours) <= 0.6 * mean(theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_duplex", [False, True])
def test_more_memory_is_never_slower(name: str, is_duplex: bool) -> None:
    profile = MODELS[name]()
    rate = gap_bandwidth(profile, 1.5)
    link = SwapLink(rate, 0.9 * rate, is_duplex)
    planner = SwapPlanner(profile, link)
    plans = [planner.plan(budget_at(profile, n / 19)) for n in range(20)]
    for n, plan in enumerate(plans):
        check(plan, profile, link, budget_at(profile, n / 19))
    seconds, peaks = [plan.seconds for plan in plans], [plan.peak_bytes for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert peaks == sorted(peaks)
    assert not plans[-1].choices


@pytest.mark.parametrize("seed", range(10))
def test_any_step_keeps_its_budget(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, draw.choice((2, 5, 9)))
    check_budgets(profile, draw, is_duplex=seed % 2 == 1)


@pytest.mark.parametrize("seed", range(30))
def test_what_a_profile_may_say_is_planned(seed: int) -> None:
    draw = random.Random(seed)
    profile = tangled_profile(draw, draw.choice((1, 2, 4, 8)))
    check_budgets(profile, draw, is_duplex=seed % 2 == 1)


def check_budgets(profile: StepProfile, draw: random.Random, is_duplex: bool) -> None:
    """Check that plans for budgets that rise fit, and are never slower than for less."""
    rate = gap_bandwidth(profile, draw.choice((0.3, 1, 3)))
    link = SwapLink(rate, rate, is_duplex)
    planner = SwapPlanner(profile, link)
    before: SwapPlan | None = None
    for budget in sorted(budget_at(profile, part) for part in (0, 1, *draw.choices(PARTS, k=15))):
        plan = planner.plan(budget)
        check(plan, profile, link, budget)
        if before is not None:
            assert plan.seconds <= before.seconds
            assert plan.peak_bytes >= before.peak_bytes
        before = plan


def test_a_plan_does_not_depend_on_what_was_planned_before() -> None:
    profile = gpt_like()
    rate = gap_bandwidth(profile, 1)
    planner = SwapPlanner(profile, SwapLink(rate, rate))
    for part in (0.8, 0.1, 0.4):
        budget = budget_at(profile, part)
        assert planner.plan(budget) == plan_swap(profile, budget, SwapLink(rate, rate))


@pytest.mark.parametrize("seed", range(6))
def test_a_small_step_is_near_the_optimum(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, 4)
    rate = gap_bandwidth(profile, draw.choice((0.5, 1, 2)))
    link = SwapLink(rate, rate, seed % 2 == 1)
    budget = budget_at(profile, draw.uniform(0.1, 0.7))
    best = optimum(profile, link, budget, 30)
    assert best is not None and best.is_closed
    assert peak_bytes(profile, best.choices) <= budget
    plan = plan_swap(profile, budget, link)
    assert plan.seconds <= best.seconds + POINTS * profile.compute_seconds


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_near_the_optimum_where_that_is_known(name: str) -> None:
    num_closed = 0
    for _, profile, _, _, link, budget in made_cases(name):
        best = optimum(profile, link, budget, 60)
        if best is not None and best.is_closed:
            num_closed += 1
            plan = plan_swap(profile, budget, link)
            assert plan.seconds <= best.seconds + POINTS * profile.compute_seconds
    assert num_closed >= 6


@pytest.mark.parametrize("steps", [0.5, 2])
def test_many_storages_take_seconds(steps: float) -> None:
    profile = gpt_like(67, 7)
    assert len(profile.storages) == 538
    rate = gap_bandwidth(profile, steps)
    begin = time.process_time()
    plan = plan_swap(profile, budget_at(profile, 0.75), SwapLink(rate, rate))
    assert time.process_time() - begin < 3
    assert plan.peak_bytes <= budget_at(profile, 0.75)
