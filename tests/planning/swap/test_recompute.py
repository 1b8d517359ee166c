"""Plans that make storages again: exact, monotone, never slower than without, in time."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from itertools import pairwise

import pytest

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import SwapPlanner, make_plan, plan_swap, plan_thresholds
from elbowroom.planning.swap.clock import StepClock
from elbowroom.planning.swap.memory import peak_bytes
from elbowroom.planning.swap.recompute import recompute_sets, recomputed, with_recomputed
from elbowroom.planning.swap.timeline import SwapLink, simulate_swap
from elbowroom.plans.swap import Choice, Swapped
from tests.planning.swap.made_models import (
    MODELS,
    budget_at,
    gap_bandwidth,
    gpt_like,
    random_profile,
    tangled_profile,
    with_recipes,
)

PARTS = (0, 0.05, 0.2, 0.4, 0.7, 0.9, 1)


def made_profile(seed: int) -> tuple[random.Random, StepProfile]:
    draw = random.Random(seed)
    profile = random_profile(draw, 6) if seed % 2 else tangled_profile(draw, draw.choice((3, 8)))
    return draw, with_recipes(profile, draw)


def random_choices(profile: StepProfile, draw: random.Random) -> dict[int, Swapped]:
    choices = {}
    for storage in profile.storages:
        if storage.is_held_elsewhere or draw.random() < 0.4:
            continue
        use = storage.use_tick
        last = profile.num_ticks if use is None else use
        drop = draw.randint(storage.pack_tick, last)
        bring = None if use is None else draw.randint(drop, last)
        choices[storage.number] = Swapped(storage.number, drop, bring)
    return choices


@pytest.mark.parametrize("seed", range(40))
def test_the_step_that_is_left_has_the_peaks_and_seconds_of_the_whole(seed: int) -> None:
    draw, profile = made_profile(seed)
    rate = gap_bandwidth(profile, 1)
    link = SwapLink(rate, rate, seed % 3 == 0)
    for numbers in recompute_sets(profile):
        left = with_recomputed(profile, numbers)
        for _ in range(4):
            swapped = random_choices(left, draw)
            choices: list[Choice] = [*swapped.values(), *recomputed(profile, numbers)]
            assert peak_bytes(left, swapped.values()) == peak_bytes(profile, choices)
            timing = StepClock(left, link).time(swapped, by_need=False)
            plan = make_plan(profile, choices)
            assert plan.out_bytes == sum(profile.storages[n].num_bytes for n in swapped)
            whole = simulate_swap(profile, plan, link).seconds
            assert whole == pytest.approx(timing.seconds, rel=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_more_memory_is_never_slower_and_recipes_never_slow_a_step(seed: int) -> None:
    draw, profile = made_profile(seed)
    rate = gap_bandwidth(profile, draw.choice((0.3, 1, 3)))
    link = SwapLink(rate, rate, seed % 3 == 0)
    planner, without = SwapPlanner(profile, link), SwapPlanner(profile, link, recompute=False)
    before = None
    for part in PARTS:
        budget = budget_at(profile, part)
        plan = planner.plan(budget)
        assert peak_bytes(profile, plan.choices) == plan.peak_bytes <= budget
        assert simulate_swap(profile, plan, link).seconds == pytest.approx(plan.seconds, abs=1e-9)
        assert plan.seconds <= without.plan(budget).seconds
        with suppress(MemoryPlanError):
            assert plan.seconds <= plan_thresholds(profile, budget, link).seconds
        if before is not None:
            assert plan.seconds <= before.seconds
            assert plan.peak_bytes >= before.peak_bytes
        before = plan


def test_sets_grow_by_cost_and_have_none_of_their_sources() -> None:
    for seed in range(20):
        _, profile = made_profile(seed)
        sets = recompute_sets(profile)
        assert not sets[0]
        for one, other in pairwise(sets):
            assert one < other
        for number in sets[-1]:
            recipe = profile.storages[number].recipe
            assert recipe is not None and not sets[-1] & set(recipe.sources)


@pytest.mark.parametrize("name", MODELS)
def test_on_a_slow_link_recomputing_wins(name: str) -> None:
    profile = MODELS[name]()
    draw = random.Random(name)
    profile = with_recipes(profile, draw)
    rate = gap_bandwidth(profile, 1) / 10
    budget, link = budget_at(profile, 0.3), SwapLink(rate, rate)
    plan, without = (
        plan_swap(profile, budget, link),
        plan_swap(profile, budget, link, recompute=False),
    )
    assert plan.recomputed and not without.recomputed
    assert plan.seconds < 0.8 * without.seconds
    assert plan.out_bytes < without.out_bytes


def test_a_fast_link_needs_none() -> None:
    profile = with_recipes(gpt_like(), random.Random(1))
    plan = plan_swap(profile, budget_at(profile, 0.5), SwapLink(1e15, 1e15))
    assert plan.swapped and not plan.recomputed


@pytest.mark.parametrize("steps", [0.2, 2])
def test_many_storages_with_recipes_take_seconds(steps: float) -> None:
    profile = with_recipes(gpt_like(67, 7), random.Random(1))
    assert len(profile.storages) == 538
    rate = gap_bandwidth(profile, steps)
    begin = time.process_time()
    plan = plan_swap(profile, budget_at(profile, 0.75), SwapLink(rate, rate))
    assert time.process_time() - begin < 3
    assert plan.peak_bytes <= budget_at(profile, 0.75)
