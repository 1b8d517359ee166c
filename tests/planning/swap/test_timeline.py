"""A swapped step's seconds: by hand, and the search's clock against the simulator."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.clock import StepClock
from elbowroom.planning.swap.timeline import SwapLink, simulate_swap
from elbowroom.plans.swap import Swapped, Transfer
from tests.planning.swap.made_models import gap_bandwidth, random_profile
from tests.planning.swap.profiles import two_storages

SLOW = SwapLink(out_bandwidth=100, in_bandwidth=200)
"""Bytes per second at which the storage of 100 bytes takes 1 s out and 0.5 s back."""


def random_choices(profile: StepProfile, draw: random.Random) -> dict[int, Swapped]:
    """Any drops and brings that a plan may have, of most storages."""
    choices = {}
    for storage in profile.storages:
        assert storage.use_tick is not None
        drop, bring = sorted(draw.randint(storage.pack_tick, storage.use_tick) for _ in range(2))
        if draw.random() < 0.8:
            choices[storage.number] = Swapped(storage.number, drop, bring)
    return choices


def links(profile: StepProfile) -> list[SwapLink]:
    rate = gap_bandwidth(profile, 1)
    return [
        SwapLink(rate, rate),
        SwapLink(rate, rate / 2, latency_seconds=1e-4),
        SwapLink(rate / 2, rate, is_duplex=True),
    ]


def test_at_once_waits_for_both_copies() -> None:
    plan = make_plan(two_storages(), [Swapped(0, 0, 3)])
    timeline = simulate_swap(two_storages(), plan, SLOW)
    assert timeline.seconds == pytest.approx(1.1 + 1 + 0.5)
    assert timeline.waited_seconds(0) == pytest.approx(1.5)
    assert [wait.transfer for wait in timeline.waits] == [Transfer("out", 0), Transfer("in", 0)]


def test_compute_hides_what_is_dropped_later_and_brought_earlier() -> None:
    plan = make_plan(two_storages(), [Swapped(0, 2, 2)])
    # The copy out takes from 0.1 to 1.1 s, tick 2 begins at 0.4: 0.7 s are waited. The copy back
    # takes from 1.1 to 1.6 s, tick 3 begins at 1.4.
    timeline = simulate_swap(two_storages(), plan, SLOW)
    assert [wait.seconds for wait in timeline.waits] == pytest.approx([0.7, 0.2])
    assert timeline.seconds == pytest.approx(2.0)
    copies = [span for span in timeline.spans() if span.track != "compute"]
    assert [(span.name, span.track) for span in copies] == [("O0", "out"), ("I0", "in")]


def test_a_duplex_link_copies_both_ways_at_once() -> None:
    choices = [Swapped(0, 3, 3), Swapped(1, 1, 2)]
    one_queue = simulate_swap(two_storages(), make_plan(two_storages(), choices), SLOW)
    duplex = replace(SLOW, is_duplex=True)
    two_queues = simulate_swap(two_storages(), make_plan(two_storages(), choices), duplex)
    assert two_queues.seconds <= one_queue.seconds


def test_latency_counts_for_every_transfer() -> None:
    plan = make_plan(two_storages(), [Swapped(0, 0, 3)])
    late = replace(SLOW, latency_seconds=0.25)
    assert simulate_swap(two_storages(), plan, late).seconds == pytest.approx(2.6 + 0.5)


@pytest.mark.parametrize("seed", range(12))
def test_the_clock_has_the_simulators_seconds_and_waits(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, 9)
    for link in links(profile):
        clock = StepClock(profile, link)
        for by_need in (True, False):
            choices = random_choices(profile, draw)
            timing = clock.time(choices, by_need)
            plan = make_plan(profile, choices.values())
            if by_need:
                plan = replace(plan, transfers=timing.transfers)
            timeline = simulate_swap(profile, plan, link)
            assert timing.seconds == pytest.approx(timeline.seconds, abs=1e-9)
            for number in choices:
                waited = timeline.waited_seconds(number)
                assert timing.waited.get(number, 0) == pytest.approx(waited, abs=1e-9)


def test_a_plan_of_another_step_is_refused() -> None:
    plan = make_plan(two_storages(), [])
    with pytest.raises(InputError, match="4 ticks"):
        simulate_swap(random_profile(random.Random(0), 5), plan, SLOW)


def test_a_link_needs_rates() -> None:
    with pytest.raises(InputError):
        SwapLink(0, 1)
