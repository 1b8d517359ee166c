"""Profile of one training step of a script, measured while everything it saves is swapped."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from elbowroom.core.step_profile import StepProfile
from elbowroom.profiling.layers import LEAST_SECONDS
from elbowroom.profiling.recipes import recipe_prover
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import SMALLEST_BYTES, Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.meter import installed_meter, uncounted_bytes
from elbowroom.swap.optimizer import SwappedOptimizer, swapped_to
from elbowroom.swap.tier import FileTier
from elbowroom.training.loop import LoopOptions, TrainingLoop
from elbowroom.training.script import load_script

_MOST_STEPS, _FEWEST_STEPS = 100, 2


def profile_script_step(
    path: Path,
    options: LoopOptions,
    seconds: float | None = None,
    num_threads: int | None = None,
    tier: Path | None = None,
    *,
    swaps_optimizer: bool = False,
    most_bytes: int = 0,
) -> StepProfile:
    """Train for ``seconds`` (default 1) with everything swapped, and profile a step.

    The first step is not measured: after it, the optimizer has its state. The last is profiled,
    with the median seconds of those between that are like it. How its storages could be recomputed
    is tried in it where there is room: up to what the other steps held, or ``most_bytes`` in all.
    ``num_threads`` sets torch's threads, also after the call; ``tier`` is a folder for what is
    swapped. With ``swaps_optimizer`` gradients and the optimizer's state are swapped, too.

    Raises InputError for a script that cannot be used, MeterUnavailableError where memory cannot be
    metered.
    """
    installed_meter()  # before the script makes its first tensor
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    swapped = swapped_to(tier) if swaps_optimizer else None
    loop = TrainingLoop(load_script(path), replace(options, num_steps=_MOST_STEPS + 2), swapped)
    end = time.perf_counter() + (LEAST_SECONDS if seconds is None else seconds)
    with closing(Link(FileTier(tier))) as link:
        steps = _MeasuredSteps(loop, link)
        steps.take()
        profiles = [steps.take()]
        while len(profiles) < _FEWEST_STEPS or time.perf_counter() < end:
            if len(profiles) == _MOST_STEPS:
                break
            profiles.append(steps.take())
        last = steps.take(max(steps.held_bytes, most_bytes))
    return _typical(profiles, last)


class _MeasuredSteps:
    """Steps of a loop with everything swapped at once; ``held_bytes`` is the most of any of them.

    Those are bytes that the meter counts.
    """

    def __init__(self, loop: TrainingLoop, link: Link) -> None:
        self.held_bytes = 0
        self._loop = loop
        self._link = link
        self._batches = loop.batches()
        self._meter = installed_meter()

    def take(self, most_bytes: int | None = None) -> StepProfile:
        """Take a step, and try recipes in it if it may hold ``most_bytes``."""
        model, optimizer, meter = self._loop.model, self._loop.optimizer, self._meter
        batch = next(self._batches)
        if isinstance(optimizer, SwappedOptimizer):
            optimizer.send_away()
        recorder = StepRecorder(
            model,
            meter,
            meter.held_bytes + uncounted_bytes(meter, model, optimizer),
            SMALLEST_BYTES,
            swaps_optimizer=isinstance(optimizer, SwappedOptimizer),
            prover=None if most_bytes is None else recipe_prover(model, meter, most_bytes),
        )
        candidates = Candidates(model, SMALLEST_BYTES)
        step = SwappedStep(None, self._link, candidates, observer=recorder, stays=meter.older())
        meter.reset_peak()
        with recorder.recording():
            with step.hooks():
                self._loop.backward(batch)
            step.end()
        self.held_bytes = max(self.held_bytes, meter.peak_bytes)
        del batch
        self._loop.update()
        return recorder.profile()


def _typical(profiles: Sequence[StepProfile], last: StepProfile) -> StepProfile:
    """The last profile, with the median seconds of those with the same ticks and storages."""
    alike = [one for one in profiles if _what(one) == _what(last)]
    if len(alike) < len(profiles):
        warnings.warn(
            f"{len(profiles) - len(alike)} of {len(profiles)} measured steps save other tensors "
            "than the last: a plan fits one kind of step, others swap everything",
            stacklevel=2,
        )
    alike = alike or [last]
    columns = zip(*(one.seconds for one in alike), strict=True)
    return replace(
        last,
        seconds_before=median(one.seconds_before for one in alike),
        seconds=tuple(median(column) for column in columns),
    )


def _what(profile: StepProfile) -> list[tuple[int, tuple[int, ...]]]:
    """What a step saves, and when."""
    return [(storage.num_bytes, storage.pack_ticks) for storage in profile.storages]
