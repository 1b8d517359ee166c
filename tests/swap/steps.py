"""Steps of a case: plain, measured with everything swapped, and under any plan."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from elbowroom.core.errors import MeterUnavailableError
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import make_plan
from elbowroom.plans.swap import Choice, Recomputed, Swapped, SwapPlan
from elbowroom.profiling.recipes import recipe_prover
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.meter import Meter, installed_meter
from elbowroom.swap.report import StepCounts
from tests.swap.models import Case

SMALLEST = 256
"""Small models save small tensors: swap them all the same."""


class Outcome(NamedTuple):
    """What a step computed and, if it was metered, the most that it held over its start."""

    loss: torch.Tensor
    gradients: list[torch.Tensor]
    state: dict[str, Any]
    peak_bytes: int
    counts: StepCounts


def needed_meter() -> Meter:
    """The meter, or the test is skipped with the reason."""
    try:
        return installed_meter()
    except MeterUnavailableError as error:
        pytest.skip(str(error))


def plain_step(case: Case) -> Outcome:
    case.clear()
    loss = case.loss()
    loss.backward()
    outcome = _outcome(case, loss, 0, StepCounts())
    case.clear()
    return outcome


def swapped_step(case: Case, link: Link, plan: SwapPlan | None, **options: Any) -> Outcome:
    """One step under a plan; the model's state is as before when it returns."""
    case.clear()
    before = copy.deepcopy(case.model.state_dict())
    step = SwappedStep(plan, link, Candidates(case.model, SMALLEST), **options)
    gc.collect()
    meter = needed_meter()
    held = meter.held_bytes
    meter.reset_peak()
    with step.hooks():
        loss = case.loss()
        loss.backward()
    step.end()
    outcome = _outcome(case, loss, meter.peak_bytes - held, step.counts)
    case.clear()
    case.model.load_state_dict(before)
    return outcome


def profiled(case: Case, link: Link, body: Callable[[], None] | None = None) -> StepProfile:
    """Profile of the case's step, or of ``body`` on the case's model."""
    case.clear()
    before = copy.deepcopy(case.model.state_dict())
    meter = needed_meter()
    prover = recipe_prover(case.model, meter)
    recorder = StepRecorder(case.model, meter, 0, SMALLEST, prover=prover)
    step = SwappedStep(None, link, Candidates(case.model, SMALLEST), observer=recorder)
    with recorder.recording():
        with step.hooks():
            if body is None:
                case.loss().backward()
            else:
                body()
        step.end()
    case.clear()
    case.model.load_state_dict(before)
    return recorder.profile()


def random_plan(profile: StepProfile, rng: random.Random) -> SwapPlan:
    """Some storages kept, some dropped at once or late and brought on demand or early, some remade.

    What a recipe reads is brought when it is read, or before.
    """
    remade = random_recomputed(profile, rng)
    needs: dict[int, int] = {}
    for each in remade:
        use = profile.storages[each.storage].use_tick
        assert use is not None
        for number in each.recipe.sources:
            needs[number] = min(use, needs.get(number, use))
    choices: list[Choice] = list(remade)
    for storage in profile.storages:
        if rng.random() < 0.4 or any(each.storage == storage.number for each in remade):
            continue
        pack, use = storage.pack_tick, storage.use_tick
        last = profile.num_ticks if use is None else min(use, needs.get(storage.number, use))
        drop = pack if rng.random() < 0.3 else rng.randint(pack, min(last, pack + 12))
        bring = None if use is None else last
        if bring is not None and rng.random() < 0.7:
            bring = rng.randint(max(drop, last - 12), last)
        choices.append(Swapped(storage.number, drop, bring))
    return make_plan(profile, choices)


def random_recomputed(profile: StepProfile, rng: random.Random) -> list[Recomputed]:
    """Some of the storages that can be made again, none of which another is made from."""
    taken: dict[int, Recomputed] = {}
    sources: set[int] = set()
    able = [storage for storage in profile.storages if storage.recipe is not None]
    for storage in rng.sample(able, rng.randint(0, len(able))):
        assert storage.recipe is not None
        reads = storage.recipe.sources
        if storage.number not in sources and not taken.keys() & set(reads):
            taken[storage.number] = Recomputed(storage.number, storage.recipe)
            sources.update(reads)
    return list(taken.values())


def assert_same(one: Outcome, other: Outcome) -> None:
    """Losses, gradients and buffers, to the bit."""
    assert torch.equal(one.loss, other.loss)
    assert len(one.gradients) == len(other.gradients) > 0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def _outcome(case: Case, loss: torch.Tensor, peak_bytes: int, counts: StepCounts) -> Outcome:
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    return Outcome(loss.detach().clone(), case.gradients(), state, peak_bytes, counts)
