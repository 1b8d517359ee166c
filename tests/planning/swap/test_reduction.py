"""A step whose gradients are averaged: by hand, and the laws of a link that it may share."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.step_profile import ReadyGradient, StepProfile
from elbowroom.core.units import MIB
from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.reduction import Bucket, GradientReduction
from elbowroom.planning.swap.timeline import SwapLink, SwapTimeline, simulate_swap
from elbowroom.plans.swap import Swapped, SwapPlan
from tests.planning.swap.made_models import gap_bandwidth, random_profile
from tests.planning.swap.profiles import two_storages
from tests.planning.swap.test_timeline import random_choices

FAST = SwapLink(1000, 1000, is_duplex=True)


def with_gradients(profile: StepProfile, draw: random.Random) -> StepProfile:
    """The same step with some gradients, ready at any of its backward's ticks."""
    backward = range(profile.num_forward_ticks, profile.num_ticks)
    ticks = sorted(draw.choices(backward, k=10))
    gradients = (ReadyGradient(tick, draw.randrange(1, 3 * MIB)) for tick in ticks)
    return replace(profile, gradients=tuple(gradients))


def two_gradients(first: int, second: int) -> StepProfile:
    """``two_storages`` with gradients that are ready at 0.7 s and at 1.1 s, the end of compute."""
    gradients = (ReadyGradient(2, first), ReadyGradient(3, second))
    return replace(two_storages(), gradients=gradients)


def reduced(
    profile: StepProfile, link: SwapLink, *choices: Swapped, **options: int
) -> SwapTimeline:
    """Two workers' step, at 100 bytes/s, each gradient a bucket of its own."""
    reduction = GradientReduction(2, 100, 1, 1, **options)
    return simulate_swap(profile, make_plan(profile, choices), link, reduction)


def any_reduction(draw: random.Random, rate: float, *, shares_link: bool) -> GradientReduction:
    sizes = draw.randrange(1, 8 * MIB), draw.randrange(1, 2 * MIB)
    return GradientReduction(
        draw.randint(2, 9), rate * draw.uniform(0.1, 3), *sizes, shares_link=shares_link
    )


def any_case(seed: int) -> tuple[random.Random, StepProfile, SwapPlan, SwapLink]:
    draw = random.Random(seed)
    profile = with_gradients(random_profile(draw, 9), draw)
    plan = make_plan(profile, random_choices(profile, draw).values())
    rate = gap_bandwidth(profile, draw.uniform(0.3, 2))
    link = SwapLink(rate, rate * draw.uniform(0.5, 2), is_duplex=draw.random() < 0.5)
    return draw, profile, plan, link


def test_buckets_are_full_with_the_gradient_that_fills_them() -> None:
    reduction = GradientReduction(4, 1e9, bucket_bytes=10, first_bucket_bytes=4)
    gradients = [ReadyGradient(tick, size) for tick, size in enumerate((3, 2, 9, 1, 10, 6))]
    assert reduction.buckets(gradients) == [
        Bucket(1, 5),
        Bucket(3, 10),
        Bucket(4, 10),
        Bucket(5, 6),
    ]
    assert reduction.buckets([]) == []
    assert reduction.sent_bytes(40) == 60
    assert GradientReduction(1, 1e9).sent_bytes(40) == 0


def test_what_the_backward_does_not_hide_is_waited_for() -> None:
    # The first is reduced from 0.7 to 1.4 s, the second from then to 1.7 s.
    timeline = reduced(two_gradients(70, 30), FAST)
    assert timeline.seconds == pytest.approx(1.7)
    assert timeline.reduction_wait_seconds == pytest.approx(0.6)
    spans = [(span.start, span.end) for span in timeline.spans() if span.track == "reduce"]
    assert spans == [pytest.approx((0.7, 1.4)), pytest.approx((1.4, 1.7))]
    hidden = reduced(two_gradients(40, 0), FAST)
    assert (hidden.seconds, hidden.reduction_wait_seconds) == (pytest.approx(1.1), 0)


def test_copies_and_all_reduce_take_turns_on_a_duplex_link() -> None:
    # Storage 0 is asked for at 0.7 s, when the first gradient of 40 bytes is ready. Both would have
    # 100 bytes/s alone, and have 50 until the 40 bytes are in, at 1.5 s; the copy is done at 2.1 s.
    link = SwapLink(1000, 100, is_duplex=True)
    choice = Swapped(0, 2, 3)
    alone = reduced(two_gradients(40, 0), link, choice)
    shared = reduced(two_gradients(40, 0), link, choice, shares_link=True)
    assert alone.waited_seconds(0) == pytest.approx(1.0)
    assert shared.waited_seconds(0) == pytest.approx(1.4)
    assert shared.seconds == pytest.approx(2.5)


def test_a_slow_network_leaves_the_rest_of_the_link_to_copies() -> None:
    # Equal shares would be 50 bytes/s each; the network has no use for more than 20.
    link = SwapLink(1000, 100, is_duplex=True)
    profile = two_gradients(40, 0)
    plan = make_plan(profile, [Swapped(0, 2, 3)])
    slow = simulate_swap(profile, plan, link, GradientReduction(2, 20, 1, 1, shares_link=True))
    assert slow.waited_seconds(0) == pytest.approx(100 / 80)
    half = simulate_swap(profile, plan, link, GradientReduction(2, 60, 1, 1, shares_link=True))
    assert half.waited_seconds(0) == pytest.approx(1.4)


def test_shares_are_of_bytes_and_not_of_speeds() -> None:
    # The all-reduce could send 60 bytes/s of the 100 and outlasts the copy: both have 50.
    link = SwapLink(1000, 100, is_duplex=True)
    profile = two_gradients(200, 0)
    plan = make_plan(profile, [Swapped(0, 2, 3)])
    timeline = simulate_swap(profile, plan, link, GradientReduction(2, 60, 1, 1, shares_link=True))
    assert timeline.waited_seconds(0) == pytest.approx(100 / 50)
    # The other 100 bytes have the link for themselves from 2.7 s on.
    assert timeline.seconds == pytest.approx(2.7 + 100 / 60)


def test_on_one_queue_an_all_reduce_crosses_twice() -> None:
    # 60 bytes out and 60 back at 100 and 200 bytes/s are 0.9 s, from 0.7 s on.
    timeline = reduced(two_gradients(60, 0), SwapLink(100, 200), shares_link=True)
    assert timeline.seconds == pytest.approx(1.6)


def test_on_one_queue_copies_have_half_of_what_crosses() -> None:
    # A copy of c bytes/s beside c / 2 out and c / 2 back: c (1 + 1/2) / 100 + c / 2 / 1000 = 1.
    timeline = reduced(
        two_gradients(200, 0), SwapLink(1000, 100), Swapped(0, 2, 3), shares_link=True
    )
    assert timeline.waited_seconds(0) == pytest.approx(100 * (1.5 / 100 + 0.5 / 1000))


@pytest.mark.parametrize("seed", range(30))
def test_all_bytes_cross_the_link_and_no_others(seed: int) -> None:
    draw, profile, plan, link = any_case(seed)
    for shares_link in (True, False):
        reduction = any_reduction(draw, link.in_bandwidth, shares_link=shares_link)
        timeline = simulate_swap(profile, plan, link, reduction)
        num_bytes = sum(gradient.num_bytes for gradient in profile.gradients)
        sent = reduction.sent_bytes(num_bytes) if shares_link else 0
        out = timeline.busy_seconds("out") * link.out_bandwidth
        back = timeline.busy_seconds("in") * link.in_bandwidth
        assert (out, back) == pytest.approx((plan.out_bytes + sent, plan.in_bytes + sent))
        assert max(timeline.busy_seconds("out"), timeline.busy_seconds("in")) <= timeline.seconds


@pytest.mark.parametrize("seed", range(30))
def test_a_shared_link_is_never_faster(seed: int) -> None:
    draw, profile, plan, link = any_case(seed)
    plain = simulate_swap(profile, plan, link)
    separate = any_reduction(draw, link.in_bandwidth, shares_link=False)
    shared = replace(separate, shares_link=True)
    apart = simulate_swap(profile, plan, link, separate)
    together = simulate_swap(profile, plan, link, shared)
    waited = [wait.seconds for wait in plain.waits]
    assert [wait.seconds for wait in apart.waits] == pytest.approx(waited, abs=1e-9)
    assert apart.seconds >= plain.seconds - 1e-9
    assert together.seconds >= apart.seconds - 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_more_workers_are_never_faster(seed: int) -> None:
    draw, profile, plan, link = any_case(seed)
    for shares_link in (True, False):
        reduction = any_reduction(draw, link.in_bandwidth, shares_link=shares_link)
        more = replace(reduction, num_workers=reduction.num_workers + 1)
        fewer = simulate_swap(profile, plan, link, reduction).seconds
        assert simulate_swap(profile, plan, link, more).seconds >= fewer - 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_a_slower_network_is_never_faster_beside_the_link(seed: int) -> None:
    # On the link it may be: it leaves more of it to copies that the backward waits for.
    draw, profile, plan, link = any_case(seed)
    reduction = any_reduction(draw, link.in_bandwidth, shares_link=False)
    slower = replace(reduction, bandwidth=reduction.bandwidth / 1.5)
    faster = simulate_swap(profile, plan, link, reduction).seconds
    assert simulate_swap(profile, plan, link, slower).seconds >= faster - 1e-9


def test_one_replica_takes_the_time_of_none() -> None:
    _, profile, plan, link = any_case(3)
    alone = GradientReduction(1, 1.0, shares_link=True)
    assert simulate_swap(profile, plan, link, alone).seconds == pytest.approx(
        simulate_swap(profile, plan, link).seconds
    )


def test_what_cannot_be_is_refused() -> None:
    for wrong in ((0, 1.0), (2, 0.0), (2, float("nan")), (2, 1.0, 0), (2, 1.0, 1, 0)):
        with pytest.raises(InputError):
            GradientReduction(*wrong)
    profile = two_storages()
    with pytest.raises(InputError):
        simulate_swap(profile, make_plan(profile, ()), FAST, GradientReduction(2, 1.0))
