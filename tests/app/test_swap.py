"""Training under a budget: the budget is a law, the report is exact, refusals come first."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from elbowroom.app.swap import Swap
from elbowroom.core.errors import InputError, MemoryPlanError, RecomputeError, StepChangedError
from elbowroom.core.step_profile import StepProfile
from elbowroom.planning.swap.choose import make_plan, plan_swap, with_static_bytes
from elbowroom.planning.swap.memory import floor_bytes
from elbowroom.planning.swap.timeline import SwapLink
from elbowroom.swap.report import StepReport
from elbowroom.swap.tier import MemoryTier
from tests.swap.models import MAKERS, Case, make
from tests.swap.steps import needed_meter


@pytest.fixture(autouse=True)
def metered(one_thread: None) -> Iterator[None]:
    needed_meter()
    yield


class Run:
    """Training with AdamW under a swap, or plainly."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.case = case
        self.optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-2)
        self.swap = None
        if options:
            options = {"tier": MemoryTier(1 << 28), **options}
            self.swap = Swap(case.model, optimizer=self.optimizer, **options)
        self.reports: list[StepReport] = []

    def train(self, num_steps: int, *, is_last: bool = True) -> list[float]:
        """Losses of some steps."""
        losses = []
        for _ in range(num_steps):
            with self.swap.step() if self.swap else nullcontext():
                loss = self.case.loss()
                loss.backward()
            if self.swap:
                self.reports.append(self.swap.report())
            losses.append(loss.item())
            del loss
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.swap and is_last:
            self.swap.close()
        return losses


class Measured(NamedTuple):
    """A case's profile, with what is held between its steps beyond what was before it was made."""

    profile: StepProfile
    static_bytes: int


def measured(name: str) -> Measured:
    gc.collect()
    held = needed_meter().held_bytes
    run = Run(make(name), budget="1GiB")
    run.train(3)
    assert run.swap is not None and run.swap.plan is not None and run.swap.profile is not None
    profile = with_static_bytes(run.swap.profile, run.swap.plan.static_bytes)
    return Measured(profile, profile.static_bytes - held)


def check_budgets(name: str, num_budgets: int) -> None:
    """Train under budgets from the floor to all kept: never exceeded, always exact and plain."""
    plain = Run(make(name)).train(3)
    profile, static_bytes = measured(name)
    floor = floor_bytes(profile) - profile.static_bytes + static_bytes
    most = make_plan(profile, ()).peak_bytes - profile.static_bytes + static_bytes
    assert floor < most
    peaks, run = [], None
    for k in range(num_budgets):
        del run  # with what it holds
        room = floor + (most - floor) * k // (num_budgets - 1)
        gc.collect()
        held = needed_meter().held_bytes
        run = Run(make(name), budget=held + room)
        assert run.train(3) == plain
        for report in run.reports:
            assert report.peak_bytes <= held + room
        last = run.reports[-1]
        assert last.predicted_peak_bytes == last.peak_bytes
        assert last.plan is not None and last.counts.out_bytes == last.plan.out_bytes
        peaks.append(last.peak_bytes - held)
    assert peaks == sorted(peaks)
    assert (peaks[0], peaks[-1]) == (floor, most)


@pytest.mark.parametrize("name", MAKERS)
def test_budgets_from_floor_to_keep_all_are_kept(name: str) -> None:
    check_budgets(name, 5)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MAKERS)
def test_twenty_budgets_are_kept(name: str) -> None:
    check_budgets(name, 20)


def test_one_byte_below_the_floor_is_refused_before_the_step() -> None:
    profile, static_bytes = measured("cnn")
    gc.collect()
    needed = needed_meter().held_bytes + floor_bytes(profile) - profile.static_bytes + static_bytes
    run = Run(make("cnn"), budget=needed - 1)
    refused = needed_meter().num_refused
    with pytest.raises(MemoryPlanError, match=rf"{needed} bytes.*{needed - 1}"):
        run.train(3)
    assert len(run.reports) == 1  # the measured step, without the optimizer's state
    assert needed_meter().num_refused == refused


def test_a_plan_whose_step_begins_with_more_than_it_was_made_for_is_refused() -> None:
    profile, _ = measured("cnn")
    plan = plan_swap(profile, floor_bytes(profile))
    more = torch.empty(1 << 20)
    run = Run(make("cnn"), plan=plan)
    with pytest.raises(MemoryPlanError, match="plan again"):
        run.train(1)
    del more


def test_the_meter_refuses_what_the_budget_does_not_have() -> None:
    gc.collect()
    run = Run(make("cnn"), budget=needed_meter().held_bytes + 60_000)
    with pytest.raises(MemoryPlanError, match="memory budget") as refused:
        run.train(1)
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)
    unbound = Run(make("cnn"), budget=needed_meter().held_bytes + 60_000, enforce=False)
    unbound.train(1)
    assert unbound.reports[0].peak_bytes > needed_meter().held_bytes + 60_000


def test_another_batch_is_measured_again_and_both_are_right() -> None:
    case = make("cnn")
    half = Case(case.model, case.inputs[:2].clone(), case.targets[:2].clone())
    plain = Run(case)
    expected = plain.train(2)
    plain.case = half
    expected += plain.train(3)

    case = make("cnn")
    run = Run(case, budget="1GiB")
    losses = run.train(2, is_last=False)
    run.case = Case(case.model, half.inputs, half.targets)
    losses += run.train(3)
    assert losses == expected
    changes = [bool(report.counts.change) for report in run.reports]
    assert changes == [False, False, True, False, False]
    assert [report.plan is None for report in run.reports] == [True, False, False, True, False]


def test_a_step_that_failed_is_followed_by_one_as_planned() -> None:
    expected = Run(make("cnn")).train(3)
    run = Run(make("cnn"), budget="1GiB")
    losses = run.train(2, is_last=False)
    assert run.swap is not None
    with pytest.raises(KeyError), run.swap.step():
        run.case.loss()
        raise KeyError("of the user's own")
    assert losses == expected[:2]
    with run.swap.step():
        run.case.loss().backward()
    assert not run.swap.report().counts.change
    run.swap.close()


def test_a_step_that_differs_may_raise() -> None:
    profile, _ = measured("cnn")
    run = Run(make("lstm"), plan=make_plan(profile, ()), on_change="raise")
    with pytest.raises(StepChangedError, match="plan"):
        run.train(1)


def test_a_file_on_disk_serves_and_the_report_says_what_was_moved(tmp_path: Path) -> None:
    profile, _ = measured("cnn")
    plan = plan_swap(profile, floor_bytes(profile))
    run = Run(make("cnn"), plan=replace(plan, budget_bytes=None), tier=tmp_path, verify=True)
    assert run.train(2) == Run(make("cnn")).train(2)
    text = str(run.reports[-1])
    assert "peak" in text and "waits" in text
    assert run.reports[-1].counts.in_bytes == plan.in_bytes > 0
    assert not list(tmp_path.iterdir())


def test_gradients_may_come_from_several_batches_in_one_step() -> None:
    case = make("transformer")
    case.loss().backward()
    case.loss().backward()
    expected = case.gradients()
    case.clear()
    with Swap(case.model, budget="1GiB", tier=MemoryTier(1 << 28)) as swap:
        for _ in range(2):
            case.clear()
            with swap.step():
                case.loss().backward()
                case.loss().backward()
            assert all(map(torch.equal, expected, case.gradients()))
        report = swap.report()
    assert report.predicted_peak_bytes == report.peak_bytes


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_gradients_that_were_there_when_it_was_measured_are_counted_when_they_are_not(
    name: str,
) -> None:
    """The measured step adds to gradients, those after it make them."""
    case = make(name)
    case.loss().backward()
    held = sum(gradient.nbytes for gradient in case.gradients())
    with Swap(case.model, budget="1GiB", tier=MemoryTier(1 << 28)) as swap:
        for _ in range(3):
            with swap.step():
                case.loss().backward()
            case.clear()
        assert swap.profile is not None and swap.profile.held_gradient_bytes == held
        budget = swap.plan.peak_bytes if swap.plan else 0
        report = swap.report()
    assert report.peak_bytes is not None and report.predicted_peak_bytes is not None
    assert report.predicted_peak_bytes - held <= report.peak_bytes <= report.predicted_peak_bytes
    assert report.predicted_peak_bytes <= budget


def run_at(name: str, part: float, **options: Any) -> Run:
    """A run with a budget between the floor and keeping all, over a link of 1 MB/s."""
    profile, static_bytes = measured(name)
    floor, most = floor_bytes(profile), make_plan(profile, ()).peak_bytes
    gc.collect()
    held = needed_meter().held_bytes - profile.static_bytes + static_bytes
    budget = held + floor + int((most - floor) * part)
    slow = partial(plan_swap, link=SwapLink(1e6, 1e6))
    return Run(make(name), budget=budget, planner=slow, **options)


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_what_is_cheaper_made_again_than_moved_is_made_again(name: str) -> None:
    expected = Run(make(name)).train(3)
    run = run_at(name, 0.4)
    assert run.train(3) == expected
    last = run.reports[-1]
    assert last.plan is not None and last.plan.recomputed
    assert last.counts.num_recomputed == len(last.plan.recomputed)
    assert last.predicted_peak_bytes == last.peak_bytes
    assert "recomputed" in str(last)
    without = run_at(name, 0.4, recompute=False)
    assert without.train(3) == expected
    plan = without.reports[-1].plan
    assert plan is not None and not plan.recomputed and plan.seconds > last.plan.seconds


def test_a_model_that_changes_its_mode_is_measured_again() -> None:
    plain = Run(make("unet"))
    expected = plain.train(2)
    plain.case.model.train(False)
    expected += plain.train(2)
    run = run_at("unet", 0.4)
    losses = run.train(2, is_last=False)
    run.case.model.train(False)
    assert losses + run.train(2) == expected
    assert [report.plan is None for report in run.reports] == [True, False, True, False]


def test_constants_that_change_are_found_once_and_then_never_recomputed() -> None:
    run = run_at("unet", 0.4)
    losses = run.train(2, is_last=False)
    norms = [each for each in run.case.model.modules() if isinstance(each, nn.BatchNorm3d)]
    for norm in norms:
        norm.eps *= 2
    with pytest.raises(RecomputeError):
        run.train(1, is_last=False)
    run.optimizer.zero_grad()
    run.train(3)
    assert len(losses) == 2 and run.swap is not None and run.swap.profile is not None
    assert run.reports[-1].plan is not None and not run.reports[-1].plan.recomputed


@pytest.mark.parametrize("options", [{}, {"plan": "both", "budget": "1GiB"}])
def test_there_is_either_a_plan_or_a_budget(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="one of them"):
        Swap(nn.Linear(2, 2), **options)


def test_a_killed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    program = f"""
import os, signal, torch
from elbowroom.app.swap import Swap
from tests.swap.models import make
case = make("cnn")
swap = Swap(case.model, budget="1GiB", tier={str(tmp_path)!r})
with swap.step():
    loss = case.loss()
    names = [os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")]
    assert any("elbowroom-swap" in name and name.endswith("(deleted)") for name in names)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(tmp_path.iterdir())


def test_copies_are_held_back_to_a_rate() -> None:
    case = make("cnn")
    run = Run(case, budget="1GiB", bytes_per_second=1e7)
    run.train(1)
    counts = run.reports[0].counts
    assert counts.in_bytes > 0
    assert run.reports[0].link_seconds >= (counts.out_bytes + counts.in_bytes) / 1e7


def test_the_measured_step_needs_no_more_than_the_floor() -> None:
    """Although the caller holds the batch. Less is refused by what it needs."""
    case = make("transformer")
    embedded = Case(case.model.head, torch.randn(64, 64, 32), torch.randint(50, (64, 50)))
    held = needed_meter().held_bytes
    peaks = []
    for budget in (1 << 30, 0, -1):
        most = budget if budget > 0 else held + max(peaks) + budget
        with Swap(embedded.model, budget=most, tier=MemoryTier(1 << 28)) as swap:
            embedded.clear()
            if budget < 0:
                with pytest.raises(MemoryPlanError), swap.step():
                    embedded.loss().backward()
                continue
            with swap.step():
                embedded.loss().backward()
            embedded.clear()
            assert swap.profile is not None
            floor = floor_bytes(swap.profile)
            assert swap.report().peak_bytes == floor
            peaks.append(floor - held)


class Reassigning(nn.Module):
    """Has a buffer that each forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("mean", torch.zeros(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu()
        self.mean = hidden.detach() * 0.5 + self.mean * 0.5
        return self.second(hidden * self.mean).relu()


def test_a_buffer_that_is_replaced_in_a_step_leaves_its_name_to_nobody() -> None:
    torch.manual_seed(2)
    model, x = Reassigning(), torch.randn(64, 64)
    with Swap(model, budget="1GiB", tier=MemoryTier(1 << 28)) as swap:
        for step in range(12):
            with swap.step():
                model(x).sum().backward()
            assert not swap.report().counts.change, step
            model.zero_grad()


@pytest.mark.parametrize(
    "options",
    [
        *({"budget": budget} for budget in (0, -1, True, 1.5e9, float("nan"), "0", [1])),
        {"budget": "1GiB", "bytes_per_second": 0},
        {"budget": "1GiB", "bytes_per_second": -1.0},
        {"budget": "1GiB", "on_change": "explode"},
        {"budget": "1GiB", "optimizer": "adam"},
        {"budget": "1GiB", "tier": 5},
    ],
    ids=str,
)
def test_arguments_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Swap(make("cnn").model, **options)


def test_the_state_of_sparse_gradients_is_counted() -> None:
    model = nn.EmbeddingBag(50, 64, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Swap(model, optimizer=optimizer, budget="1GiB", tier=MemoryTier(1 << 28)) as swap:
        for _ in range(3):
            with swap.step():
                model(torch.randint(50, (8, 4))).relu().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert swap.report().peak_bytes
