"""Training of a script by a swap plan, in this process, with reports on the way and at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from elbowroom.app.memory_picture import Curve, memory_picture
from elbowroom.app.swap import Swap
from elbowroom.core.errors import (
    ElbowroomError,
    InputError,
    MemoryPlanError,
    MeterUnavailableError,
    first_line,
)
from elbowroom.core.files import write_text
from elbowroom.core.trace import Count, Span, write_trace
from elbowroom.core.units import format_bytes
from elbowroom.plans.swap import SwapPlan
from elbowroom.swap.meter import installed_meter
from elbowroom.swap.optimizer import swapped_to
from elbowroom.swap.report import StepReport
from elbowroom.swap.trace import StepTrace
from elbowroom.training.loop import LoopOptions, TrainingLoop, num_samples
from elbowroom.training.losses import LossLog
from elbowroom.training.script import load_script
from elbowroom.training.user_code import where

_STEPS_TRACED = 10


@dataclass(frozen=True)
class SwapRunOptions:
    """How a plan is carried out.

    Args:
        enforce: refuse allocations beyond the budget; None for where memory can be metered.
        verify: compare checksums of what left and what came back.
        tier: folder for what is swapped; None for the plan's, or else for temporary files.
        checkpoints: folder for checkpoints, from the newest of which a run resumes.
        every: steps to a checkpoint.
        trace: file for the last steps' times and memory, predicted and measured.
        picture: file for the last step's memory over time as a picture.

    """

    enforce: bool | None = None
    verify: bool = False
    tier: Path | None = None
    checkpoints: Path | None = None
    every: int = 100
    trace: Path | None = None
    picture: Path | None = None


class _Done(NamedTuple):
    """One step that was taken, the ``number``-th of the whole run."""

    number: int
    loss: float
    num_samples: int
    report: StepReport


def train_swapped(
    script: Path,
    plan: SwapPlan,
    loop_options: LoopOptions,
    options: SwapRunOptions,
    say: Callable[[str], None],
) -> list[float]:
    """Train a script by a plan, and return the losses; ``say`` is given each line of the report.

    Sets torch's threads to the plan's. Raises InputError for a script that fails, MemoryPlanError
    for a step that needs more than the budget, OutputError.
    """
    enforce = _is_enforced(options.enforce, say)
    torch.set_num_threads(plan.num_threads)
    tier = options.tier or (Path(plan.tier) if plan.tier else None)
    swapped = swapped_to(tier) if plan.swaps_optimizer else None
    loop = TrainingLoop(load_script(script), loop_options, swapped)
    if options.checkpoints is not None:
        loop.restore(options.checkpoints)
        if loop.num_done >= loop_options.num_steps:
            raise InputError(
                f"{options.checkpoints} has learned from {loop.num_done} already: raise --steps"
            )
    keeps_trace = options.trace is not None or options.picture is not None
    last: deque[_Done] = deque(maxlen=_STEPS_TRACED)
    summary = _Summary()
    with Swap(
        loop.model,
        plan,
        loop.optimizer,
        tier=tier,
        enforce=enforce,
        verify=options.verify,
        keeps_trace=keeps_trace,
    ) as swap:
        for done in _steps(loop, swap, script, options):
            last.append(done)
            if line := summary.add(done):
                say(line)
    for line in (*summary.lines(), *str(last[-1].report).splitlines()):
        say(line)
    if options.trace is not None:
        write_trace(options.trace, _events(last))
    if options.picture is not None:
        write_text(options.picture, _picture(last[-1].report))
    return summary.log.losses


def _is_enforced(wanted: bool | None, say: Callable[[str], None]) -> bool:
    """Install the meter before the script makes its first tensor; whether it is to refuse.

    Raises MeterUnavailableError if it must and cannot be had.
    """
    try:
        installed_meter()
    except MeterUnavailableError as error:
        if wanted:
            raise
        say(f"the budget is not enforced, and peaks are not measured: {first_line(error)}")
        return False
    return wanted is not False


def _steps(
    loop: TrainingLoop, swap: Swap, script: Path, options: SwapRunOptions
) -> Iterator[_Done]:
    for batch in loop.batches():
        number = loop.num_done + 1
        try:
            with swap.step():
                loss = loop.backward(batch)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(
                f"step {number}: {first_line(error)}. The step is not the one that was profiled: "
                "profile and plan again, or pass --no-enforce"
            ) from error
        except ElbowroomError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}{where(error)}"
            raise InputError(f"{script}: step {number} failed: {problem}") from error
        rows = num_samples(batch[0])
        del batch
        loop.update()
        yield _Done(number, loss, rows, swap.report())
        is_due = number % options.every == 0 or number == loop.num_steps
        if options.checkpoints is not None and is_due:
            loop.save(options.checkpoints)


class _Summary:
    """What all steps so far have in common: losses and pace, highest peak, changes of plan."""

    def __init__(self) -> None:
        self.log = LossLog()
        self._begin = time.perf_counter()
        self._num_changed = 0
        self._peak_bytes = 0
        self._first_change = ""

    def add(self, done: _Done) -> str:
        """Note a step. Returns a line to print now and then; an empty one in between."""
        self._peak_bytes = max(self._peak_bytes, done.report.peak_bytes or 0)
        if change := done.report.counts.change:
            self._num_changed += 1
            self._first_change = self._first_change or change
        return self.log.note(done.number, done.loss, done.num_samples)

    def lines(self) -> list[str]:
        seconds = time.perf_counter() - self._begin
        lines = [self.log.ends, f"{len(self.log.losses)} steps in {seconds:.1f} s"]
        if self._peak_bytes:
            lines.append(f"highest peak: {format_bytes(self._peak_bytes)}; of the last step:")
        if self._num_changed:
            lines.append(
                f"{self._num_changed} steps are not the one that was profiled, and swapped all: "
                f"{self._first_change}. Profile with this run's settings, and plan again"
            )
        return lines


def _traced(report: StepReport) -> tuple[SwapPlan, StepTrace]:
    assert report.plan is not None and report.trace is not None
    return report.plan, report.trace


def _events(steps: deque[_Done]) -> Iterator[Span | Count]:
    """Times and memory of steps: the plan's prediction of each interval beside what was held."""
    origin = _traced(steps[0].report)[1].begin
    for done in steps:
        plan, trace = _traced(done.report)
        for span in trace.spans():
            yield span._replace(start=span.start - origin, end=span.end - origin)
        times = (trace.begin, *trace.tick_seconds)
        curves = {"predicted bytes": plan.tick_peaks, "held bytes": trace.tick_peaks or ()}
        for name, peaks in curves.items():
            for at, peak in zip(times, peaks, strict=False):
                yield Count("step", name, at - origin, plan.static_bytes + peak)


def _picture(report: StepReport) -> str:
    """The last step's memory: what was held over what was predicted."""
    plan, trace = _traced(report)
    times = tuple(at - trace.begin for at in (trace.begin, *trace.tick_seconds, trace.end))
    curves = [Curve("predicted", times, _above(plan.static_bytes, plan.tick_peaks))]
    if trace.tick_peaks is not None:
        curves.append(Curve("measured", times, _above(plan.static_bytes, trace.tick_peaks)))
    return memory_picture("Memory of a training step", curves, plan.static_bytes, plan.budget_bytes)


def _above(static_bytes: int, peaks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(static_bytes + peak for peak in peaks)
