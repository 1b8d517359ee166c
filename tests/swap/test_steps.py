"""Any plan gives the plain step's numbers to the bit, at the peak and with the bytes predicted."""

from __future__ import annotations

import random

import pytest
import torch

from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.memory import floor_bytes, floor_choices
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from tests.swap.models import MAKERS, make
from tests.swap.steps import SMALLEST, assert_same, plain_step, profiled, random_plan, swapped_step

CLOSE_BYTES = 4096


def check_plans(name: str, link: Link, num_plans: int, *, verify: bool) -> tuple[int, list[int]]:
    """Run random plans of a case. Returns how many were run, and how far off each peak was."""
    case = make(name)
    plain_step(case)  # what libraries make once is made
    plain = plain_step(case)
    profile = profiled(case, link)
    rng = random.Random(name)
    plans = [make_plan(profile, ()), make_plan(profile, floor_choices(profile))]
    plans += [random_plan(profile, rng) for _ in range(num_plans)]
    misses = []
    for plan in plans:
        outcome = swapped_step(case, link, plan, on_change="raise", verify=verify)
        assert_same(plain, outcome)
        moved = (outcome.counts.out_bytes, outcome.counts.in_bytes)
        assert moved == (plan.out_bytes, plan.in_bytes)
        assert outcome.counts.recomputed_bytes == plan.recomputed_bytes
        misses.append(outcome.peak_bytes - plan.peak_bytes)
    assert any(plan.recomputed for plan in plans) == (name != "lstm")
    assert plans[1].peak_bytes == floor_bytes(profile) < plans[0].peak_bytes
    return len(plans), misses


@pytest.mark.parametrize("name", MAKERS)
def test_random_plans_are_bitwise_and_as_predicted(link: Link, name: str) -> None:
    num_plans, misses = check_plans(name, link, 8, verify=True)
    assert sum(miss == 0 for miss in misses) >= num_plans - 1
    assert all(abs(miss) <= CLOSE_BYTES for miss in misses)


@pytest.mark.nightly
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_two_hundred_random_plans(link: Link, name: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    num_plans, misses = check_plans(name, link, 200, verify=False)
    assert sum(miss == 0 for miss in misses) >= 0.98 * num_plans
    assert all(abs(miss) <= CLOSE_BYTES for miss in misses)


def test_the_profile_is_as_long_and_complete_as_the_step(link: Link) -> None:
    case = make("cnn")
    plain_step(case)
    profile = profiled(case, link)
    assert profile.num_forward_ticks < profile.num_ticks
    assert {storage.made_by for storage in profile.storages} >= {"0.conv", "1.norm"}
    assert all(storage.use_tick for storage in profile.storages)
    assert sum(profile.deltas) > 0  # gradients stay


def test_a_plan_is_followed_after_its_round_trip(link: Link) -> None:
    case = make("transformer")
    plain_step(case)
    plain = plain_step(case)
    plan = random_plan(profiled(case, link), random.Random(1))
    again = SwapPlan.from_json(plan.to_json())
    assert again == plan
    assert_same(plain, swapped_step(case, link, again, on_change="raise"))


def test_a_step_that_differs_half_way_goes_on_from_there(link: Link) -> None:
    case = make("transformer")
    plain_step(case)
    profile = profiled(case, link)
    rng = random.Random(2)
    case.model.train(False)  # no dropout: the first mask is missing
    plain = plain_step(case)
    for _ in range(5):
        outcome = swapped_step(case, link, random_plan(profile, rng))
        assert_same(plain, outcome)
        assert outcome.counts.change and "tick 0" not in outcome.counts.change


@pytest.mark.parametrize("name", MAKERS)
def test_three_steps_may_be_in_flight(link: Link, name: str) -> None:
    """As in a pipeline's stage: three forwards, then their backwards, the first one first."""
    case = make(name)
    plain_step(case)
    expected = [case.loss() for _ in range(3)]
    for loss in expected:
        loss.backward()
    gradients = case.gradients()

    case = make(name)
    plain_step(case)
    plan = random_plan(profiled(case, link), random.Random(4))
    steps = [
        SwappedStep(each, link, Candidates(case.model, SMALLEST)) for each in (plan, None, plan)
    ]
    losses = []
    for step in steps:
        with step.hooks():
            losses.append(case.loss())
    for loss in losses:
        loss.backward()
    for step in steps:
        step.end()
        assert not step.counts.change
        assert step.counts.in_bytes > 0
    assert all(map(torch.equal, expected, losses))
    assert all(map(torch.equal, gradients, case.gradients()))
