"""A step without data has the ticks, storages and bytes of the real one, but for workspaces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from bench.models import unet3d
from torch import nn
from torch.nn import functional as F  # noqa: N812

from elbowroom.app.swap import Swap
from elbowroom.core.cluster import Rate
from elbowroom.core.errors import MeasuringError
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import GIB
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.profiling.fake_step import FakeRates, profile_fake_step
from elbowroom.swap.tier import MemoryTier
from tests.swap.models import MAKERS, make
from tests.swap.steps import SMALLEST, needed_meter, plain_step

RATES = FakeRates(Rate(1e12), Rate(1e11))
NO_TIME = Rate(math.inf)


@pytest.fixture(autouse=True)
def metered(one_thread: None) -> Iterator[None]:
    needed_meter()
    yield


def fake_profile(name: str, **options: Any) -> StepProfile:
    case = make(name)
    batch = (tuple(case.inputs.shape), case.inputs.dtype, tuple(case.targets.shape))

    def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(batch[0], dtype=batch[1]), torch.zeros(batch[2], dtype=torch.long)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return profile_fake_step(lambda: make(name).model, make_batch, loss, RATES, **options)


def real_profile(name: str) -> StepProfile:
    case = make(name)
    with Swap(case.model, budget=GIB, tier=MemoryTier(1 << 28)) as swap:
        with swap.step():
            case.loss().backward()
        assert swap.profile is not None
        return swap.profile


def held_at_ticks(profile: StepProfile) -> list[int]:
    held = list(accumulate(profile.deltas, initial=0))
    return [held[position] for position in profile.tick_positions]


def over_static(profile: StepProfile) -> tuple[int, int]:
    """Peaks of keeping all and of swapping all, without what was held before."""
    static = profile.static_bytes
    return peak_bytes(profile, ()) - static, floor_bytes(profile) - static


@pytest.mark.parametrize("name", ["cnn", "unet", "transformer"])
def test_ticks_and_storages_are_those_of_the_real_step(name: str) -> None:
    fake, real = fake_profile(name), real_profile(name)

    def facts(profile: StepProfile) -> list[Any]:
        return [
            (each.num_bytes, each.made_by, each.pack_ticks, each.unpack_ticks)
            for each in profile.storages
        ]

    assert len(fake.storages) > 5
    assert facts(fake) == facts(real)
    assert (fake.num_ticks, fake.num_forward_ticks) == (real.num_ticks, real.num_forward_ticks)
    assert [each.is_held_elsewhere for each in fake.storages] == [
        each.is_held_elsewhere for each in real.storages
    ]
    assert held_at_ticks(fake) == held_at_ticks(real)


@pytest.mark.parametrize("name", MAKERS)
def test_peaks_are_at_most_the_real_ones(name: str) -> None:
    fake, real = over_static(fake_profile(name)), over_static(real_profile(name))
    assert fake[0] <= real[0]
    assert fake[1] <= real[1]


def test_peaks_are_exact_where_kernels_take_no_workspace() -> None:
    assert over_static(fake_profile("transformer")) == over_static(real_profile("transformer"))


def test_a_plan_for_the_profile_is_followed_by_the_real_step() -> None:
    profile = fake_profile("transformer")
    plan = plan_swap(profile, (floor_bytes(profile) + peak_bytes(profile, ())) // 2)
    case = make("transformer")
    plain = plain_step(case)
    with Swap(case.model, plan, tier=MemoryTier(1 << 28), enforce=False) as swap:
        with swap.step():
            loss = case.loss()
            loss.backward()
        counts = swap.report().counts
    assert not counts.change
    assert counts.out_bytes == plan.out_bytes > 0
    assert counts.in_bytes == plan.in_bytes
    assert torch.equal(loss, plain.loss)
    assert all(map(torch.equal, case.gradients(), plain.gradients))


def test_static_bytes_are_weights_optimizer_state_and_batch() -> None:
    case = make("transformer")
    weights = [parameter.numel() * 4 for parameter in case.model.parameters()]
    batch = (case.inputs.numel() + case.targets.numel()) * 8
    plain = fake_profile("transformer")
    momentum = fake_profile(
        "transformer", optimizer_fn=lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9)
    )
    adam = fake_profile("transformer", optimizer_fn=torch.optim.AdamW)
    counts = 4 * len(weights)  # AdamW's count of steps of each parameter
    assert plain.static_bytes == sum(weights) + batch
    assert momentum.static_bytes == 2 * sum(weights) + batch
    assert adam.static_bytes == 3 * sum(weights) + counts + batch
    assert plain.deltas == momentum.deltas == adam.deltas


def linear_profile(rates: FakeRates, width: int = 16, rows: int = 8) -> StepProfile:
    return profile_fake_step(
        lambda: nn.Linear(width, width, bias=False),
        lambda: torch.zeros(rows, width),
        lambda model, batch: model(batch).sum(),
        rates,
        smallest_bytes=SMALLEST,
    )


def test_seconds_are_flops_and_bytes_over_the_rates() -> None:
    product = 2 * 8 * 16 * 16
    by_flops = linear_profile(FakeRates(Rate(100.0), NO_TIME))
    assert by_flops.compute_seconds == pytest.approx(2 * product / 100)  # no gradient of the batch
    by_bytes = linear_profile(FakeRates(NO_TIME, Rate(2.0, fraction=0.5)))
    x, w, one = 4 * 8 * 16, 4 * 16 * 16, 4
    forward = (x + w + x) + (x + one)
    # The gradient of the sum, 1, is written; expanding it is a view.
    assert by_bytes.compute_seconds >= forward + (x + x + w)
    assert by_bytes.compute_seconds <= forward + (x + x + w) + 4 * one


def test_what_no_machine_holds_is_profiled() -> None:
    profile = linear_profile(RATES, width=1 << 21)
    assert profile.static_bytes > 1 << 44


@pytest.mark.parametrize("ask", [lambda y: y * y.sum().item(), lambda y: y[y > 0]])
def test_a_model_that_asks_for_values_is_refused(ask: Any) -> None:
    with pytest.raises(MeasuringError):
        profile_fake_step(
            lambda: nn.Linear(4, 4),
            lambda: torch.zeros(2, 4),
            lambda model, batch: ask(model(batch)).sum(),
            RATES,
        )


@pytest.mark.parametrize(
    ("side", "fits_plainly"), [(144, True), (160, False), (192, False), (208, False)]
)
def test_lms_volumes_are_planned_in_16_gib(side: int, fits_plainly: bool) -> None:
    shape = (side, side, side)
    profile = profile_fake_step(
        unet3d.UNet3d,
        lambda: (torch.zeros(1, unet3d.CHANNELS, *shape), torch.zeros(1, *shape, dtype=torch.long)),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        RATES,
        optimizer_fn=torch.optim.AdamW,
    )
    assert (peak_bytes(profile, ()) <= 16 * GIB) == fits_plainly
    plan = plan_swap(profile, 16 * GIB)
    assert plan.peak_bytes <= 16 * GIB
    assert bool(plan.out_bytes) != fits_plainly
