"""Trains any PyTorch model under a memory budget: saved tensors leave the device and come back."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
from torch import nn

from elbowroom.core.errors import (
    InputError,
    MemoryPlanError,
    MeterUnavailableError,
    RecomputeError,
    first_line,
)
from elbowroom.core.step_profile import StepProfile
from elbowroom.core.units import format_bytes, parse_memory
from elbowroom.planning.swap.choose import plan_swap, with_static_bytes
from elbowroom.plans.swap import SwapPlan
from elbowroom.profiling.recipes import recipe_prover
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import SMALLEST_BYTES, Candidates
from elbowroom.swap.hooks import OnChange, SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.meter import Meter, gradient_bytes, installed_meter, uncounted_bytes
from elbowroom.swap.optimizer import SwappedOptimizer
from elbowroom.swap.report import StepReport
from elbowroom.swap.tier import FileTier, Tier
from elbowroom.swap.trace import StepTrace

Planner = Callable[[StepProfile, int], SwapPlan]


class Swap:
    """Carries out a swap plan, or makes one for a budget from its own first step.

    Enter ``step`` around forward and backward of each step. Gradients are bitwise those of the
    plain step. With a budget the first step is measured while everything is swapped; from the
    second on the plan is followed, and made anew when more is held between steps than before, as
    once the optimizer has its state. CPU tensors only; use it from one thread.

    Args:
        model: any module; its parameters and buffers stay where they are.
        plan: what leaves and when, as an earlier ``Swap`` or ``plan_swap`` made it.
        optimizer: its state counts as held between steps; that of a ``SwappedOptimizer`` is sent
            away before each.
        budget: most bytes that may be held in a step, as "6GiB" or a number; instead of a plan.
        tier: a folder on disk, or a tier; by default the folder for temporary files.
        bytes_per_second: hold copies back to this rate, as for a disk that others use, too.
        enforce: refuse an allocation beyond the budget with torch.OutOfMemoryError, inside steps.
        verify: compare checksums of what left and what came back.
        keeps_trace: keep in each report what the step did and when, and its memory.
        recompute: let plans make storages again instead of moving them, by the calls that wrote
            them in the measured step. Turn it off if constants of the model change at each step.
        on_change: when a step does not do what the plan expects, "swap" everything at once from
            there, or "raise" StepChangedError.
        planner: makes a plan from a profile and a budget in bytes.

    Raises InputError unless there is either a plan or a budget, and for a plan that was made for a
    swapped optimizer when this one is plain, or the other way round. Raises MeterUnavailableError
    where a budget is to be kept and memory cannot be metered.

    """

    def __init__(
        self,
        model: nn.Module,
        plan: SwapPlan | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        budget: str | int | None = None,
        tier: Tier | Path | str | None = None,
        bytes_per_second: float | None = None,
        enforce: bool = True,
        verify: bool = False,
        keeps_trace: bool = False,
        recompute: bool = True,
        on_change: OnChange = "swap",
        planner: Planner = plan_swap,
    ) -> None:
        if (plan is None) == (budget is None):
            raise InputError("give Swap a plan, or budget=: one of them")
        _check_arguments(optimizer, tier, on_change)
        self._swaps_optimizer = isinstance(optimizer, SwappedOptimizer)
        if plan is not None:
            _check_optimizer(plan, self._swaps_optimizer)
        self.plan = plan
        self.profile: StepProfile | None = None
        self._model = model
        self._optimizer = optimizer
        self._planner = planner
        self._makes_plans = plan is None
        self._budget_bytes = None if budget is None else _bytes_of(budget)
        if plan is not None:
            self._budget_bytes = plan.budget_bytes
        self._enforce = enforce and self._budget_bytes is not None
        self._verify = verify
        self._keeps_trace = keeps_trace
        self._recompute = recompute
        self._on_change = on_change
        self._smallest_bytes = plan.smallest_bytes if plan else SMALLEST_BYTES
        self._meter = _meter(is_needed=self._makes_plans or self._enforce)
        self._link = Link(
            tier if isinstance(tier, Tier) else FileTier(Path(tier) if tier else None),
            bytes_per_second,
        )
        self._closing = weakref.finalize(self, self._link.close)
        self._last: StepReport | None = None
        self._modes: list[bool] = []
        self._is_followed = False
        """Whether a step has followed its plan to the end."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """The context of one step: one or several forwards and their backwards.

        Raises MemoryPlanError before the step if it cannot fit, or inside of the measured one,
        torch.OutOfMemoryError inside of another that does not, SwapError if the link or the tier
        fails, and RecomputeError if the step computes something else than when it was measured; the
        next one is measured again then.
        """
        if isinstance(self._optimizer, SwappedOptimizer):
            self._optimizer.send_away()  # all of it is here after a checkpoint
        static_bytes = self._static_bytes()
        held = (static_bytes, gradient_bytes(self._model))
        self._prepare(*held)
        plan, meter = self.plan, self._meter
        recorder = trace = None
        uncounted = static_bytes - self._held_bytes_before
        if plan is None:
            recorder = self._recorder(static_bytes, uncounted)
        elif self._keeps_trace:
            trace = StepTrace(meter)
        observer = recorder or trace
        step = SwappedStep(
            plan=plan,
            link=self._link,
            candidates=Candidates(self._model, self._smallest_bytes),
            on_change=self._on_change,
            verify=self._verify,
            observer=observer,
            stays=meter.older() if meter is not None else None,
        )
        busy_before, begin = self._link.busy_seconds, time.perf_counter()
        with ExitStack() as inside:
            if meter is not None:
                meter.reset_peak()
                inside.enter_context(meter.budget(self._room_bytes(uncounted)))
            inside.enter_context(observer.recording() if observer else nullcontext())
            with step.hooks(), self._explained(is_measured=recorder is not None):
                yield
            step.end()
        self._last = StepReport(
            plan=plan,
            predicted_peak_bytes=plan.peak_bytes_with(*held) if plan else None,
            peak_bytes=meter.peak_bytes + uncounted if meter else None,
            seconds=time.perf_counter() - begin,
            counts=step.counts,
            link_seconds=self._link.busy_seconds - busy_before,
            trace=trace,
        )
        if recorder is not None:
            self.profile = recorder.profile()
        elif step.counts.change and self._makes_plans:
            self.plan = self.profile = None  # it is another step now: measure it
            self._recompute &= self._is_followed  # one that never is may differ by being recorded
        elif plan is not None:
            self._is_followed = True

    @contextmanager
    def _explained(self, *, is_measured: bool) -> Iterator[None]:
        """Say what does not fit, if it is measured.

        Measure the next step, and recompute no more, if this one computes something else.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not is_measured or self._budget_bytes is None:
                raise
            raise MemoryPlanError(
                f"a step needs more than the budget of {format_bytes(self._budget_bytes)} with all "
                f"that it saves swapped at once: {first_line(error)}. Raise the budget, make the "
                "batch smaller, or wrap the optimizer in SwappedOptimizer"
            ) from error
        except RecomputeError:
            if self._makes_plans:
                self.plan = self.profile = None
                self._recompute = False
            raise

    def report(self) -> StepReport:
        """The last step, predicted and measured. Raises InputError before the first."""
        if self._last is None:
            raise InputError("no step was taken yet: enter swap.step() first")
        return self._last

    def close(self) -> None:
        """End the link and release the tier. Backwards of earlier steps are over then."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _static_bytes(self) -> int:
        """Bytes held now, between steps; a plan's own number where nothing meters them."""
        self._held_bytes_before = 0
        if self._meter is None:
            return self.plan.static_bytes if self.plan else 0
        self._held_bytes_before = self._meter.held_bytes
        uncounted = uncounted_bytes(self._meter, self._model, self._optimizer)
        return self._held_bytes_before + uncounted

    def _prepare(self, static_bytes: int, gradient_bytes: int) -> None:
        """Have a plan that fits, unless this step is to be measured. Raises MemoryPlanError."""
        budget, modes = self._budget_bytes, _modes(self._model)
        if self._makes_plans and self.plan and self.plan.recomputed and modes != self._modes:
            self.plan = self.profile = None  # as many tensors, but other ones: nothing would differ
        self._modes = modes
        if budget is None or (self.plan is None and self.profile is None):
            return
        plan = self.plan
        needed = plan.peak_bytes_with(static_bytes, gradient_bytes) if plan else None
        if needed is not None and needed <= budget:
            return
        if self.profile is not None:
            missing = max(0, self.profile.held_gradient_bytes - gradient_bytes)
            profile = with_static_bytes(self.profile, static_bytes + missing)
            self.plan = self._planner(profile, budget)
        elif self._enforce and plan is not None and needed is not None:
            raise MemoryPlanError(
                f"the plan's peak is {format_bytes(needed)} with the {format_bytes(static_bytes)} "
                f"that are held now ({format_bytes(plan.static_bytes)} when it was made), the "
                f"budget is {format_bytes(budget)}: plan again"
            )

    def _recorder(self, static_bytes: int, uncounted_bytes: int) -> StepRecorder:
        assert self._meter is not None and self._budget_bytes is not None
        prover = None
        if self._recompute:
            prover = recipe_prover(self._model, self._meter, self._budget_bytes - uncounted_bytes)
        return StepRecorder(
            self._model,
            self._meter,
            static_bytes,
            self._smallest_bytes,
            swaps_optimizer=self._swaps_optimizer,
            prover=prover,
        )

    def _room_bytes(self, uncounted_bytes: int) -> int | None:
        """What the meter may count: the budget without what it does not see."""
        if not self._enforce or self._budget_bytes is None:
            return None
        return self._budget_bytes - uncounted_bytes


def _bytes_of(budget: object) -> int:
    """Bytes of a budget. Raises InputError unless it is a size, or a whole number above 0."""
    if isinstance(budget, str):
        budget = parse_memory(budget)
    if not isinstance(budget, int) or isinstance(budget, bool) or not 0 < budget < 2**62:
        raise InputError(f"budget is {budget!r}: give a size such as '6GiB', or a number of bytes")
    return budget


def _check_arguments(optimizer: object, tier: object, on_change: object) -> None:
    """Raise InputError for arguments of other types, or with no such meaning."""
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        raise InputError(f"optimizer is {optimizer!r}: give a torch.optim.Optimizer")
    if not isinstance(tier, Tier | Path | str | None):
        raise InputError(f"tier is {tier!r}: give a folder, or a Tier")
    if on_change not in get_args(OnChange):
        raise InputError(f"on_change is {on_change!r}: give one of {', '.join(get_args(OnChange))}")


def _check_optimizer(plan: SwapPlan, is_swapped: bool) -> None:
    """Raise InputError if a plan was made for the other kind of optimizer."""
    if plan.swaps_optimizer and not is_swapped:
        raise InputError(
            "the plan counts on gradients and optimizer state being away: wrap the optimizer in "
            "SwappedOptimizer and give it as optimizer=, or profile and plan without"
        )
    if is_swapped and not plan.swaps_optimizer:
        raise InputError(
            "the plan was made for an optimizer whose state and gradients stay: give a plain one, "
            "or profile and plan with the SwappedOptimizer"
        )


def _modes(model: nn.Module) -> list[bool]:
    """Which modules are in training mode."""
    return [module.training for module in model.modules()]


def _meter(*, is_needed: bool) -> Meter | None:
    """The process's meter; None if it is not needed and cannot be had."""
    try:
        return installed_meter()
    except MeterUnavailableError:
        if is_needed:
            raise
        return None
