"""TFLMS's rule and its autotune: what they swap, and that the largest settings are found."""

from __future__ import annotations

import random

import numpy as np
import pytest

from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.room import StepRoom, SwappedArrays
from elbowroom.planning.swap.thresholds import Autotune, Rule, rule_choices
from elbowroom.plans.swap import Swapped
from tests.planning.swap.made_models import cnn_like, random_profile
from tests.planning.swap.profiles import two_storages


def test_a_rule_swaps_what_sleeps_longer_than_its_threshold() -> None:
    assert rule_choices(two_storages(), Rule(1, 0, True)) == {0: Swapped(0, 0, 3)}
    assert rule_choices(two_storages(), Rule(0, 1, False)) == {
        0: Swapped(0, 1, 2),
        1: Swapped(1, 2, 2),
    }
    assert rule_choices(two_storages(), Rule(3, 0, True)) == {}


def test_nothing_is_brought_before_the_backward_begins() -> None:
    assert rule_choices(two_storages(), Rule(1, 99, True)) == {0: Swapped(0, 0, 2)}


@pytest.mark.parametrize("seed", range(6))
def test_the_autotune_finds_the_largest_threshold_then_the_longest_lead(seed: int) -> None:
    profile = random_profile(random.Random(seed), 6)

    def fits(rule: Rule) -> bool:
        return peak_bytes(profile, rule_choices(profile, rule).values()) <= budget

    autotune = Autotune(StepRoom(profile))
    floor, keep_all = floor_bytes(profile), peak_bytes(profile, ())
    for part in range(1, 8):
        budget = floor + (keep_all - floor) * part // 8
        rule = autotune.rule(budget)
        assert rule is not None and fits(rule)
        ticks = range(profile.num_ticks + 1)
        lead = 0 if rule.ahead == 0 else 1
        fitting = [x for x in ticks if fits(rule._replace(threshold=x, ahead=lead))]
        assert rule.threshold == max(fitting)
        if lead:
            assert rule.ahead == max(x for x in ticks if fits(rule._replace(ahead=x)))
        else:
            assert not fits(Rule(0, 1, waits_out=True))


def test_no_rule_fits_below_the_floor() -> None:
    profile = cnn_like()
    assert Autotune(StepRoom(profile)).rule(floor_bytes(profile) - 1) is None


@pytest.mark.parametrize("seed", range(8))
def test_joined_states_have_the_same_peak(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, 8)
    room = StepRoom(profile)
    drops, brings, is_swapped = (np.zeros(len(room.movable), dtype=np.int64) for _ in range(3))
    choices = []
    for place, each in enumerate(room.movable.values()):
        drops[place], brings[place] = sorted(draw.randint(each.pack, each.use) for _ in range(2))
        is_swapped[place] = draw.random() < 0.7
        if is_swapped[place]:
            choices.append(Swapped(each.number, int(drops[place]), int(brings[place])))
    arrays = SwappedArrays(is_swapped != 0, drops, brings)
    assert room.peak_bytes(arrays) == peak_bytes(profile, choices) - profile.static_bytes
