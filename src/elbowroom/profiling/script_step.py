"""Profile of one training step of a script, measured while everything it saves is swapped."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from elbowroom.core.step_profile import StepProfile
from elbowroom.profiling.layers import LEAST_SECONDS
from elbowroom.profiling.step import StepRecorder
from elbowroom.swap.candidates import SMALLEST_BYTES, Candidates
from elbowroom.swap.hooks import SwappedStep
from elbowroom.swap.link import Link
from elbowroom.swap.meter import installed_meter, uncounted_bytes
from elbowroom.swap.optimizer import SwappedOptimizer, swapped_to
from elbowroom.swap.tier import FileTier
from elbowroom.training.loop import LoopOptions, TrainingLoop
from elbowroom.training.script import load_script

_MOST_STEPS, _FEWEST_STEPS = 100, 3


def profile_script_step(
    path: Path,
    options: LoopOptions,
    seconds: float | None = None,
    num_threads: int | None = None,
    tier: Path | None = None,
    *,
    swaps_optimizer: bool = False,
) -> StepProfile:
    """Train for ``seconds`` (default 1) with everything swapped, and profile a step.

    The first step is not measured: after it, the optimizer has its state. Of the others, the last
    is profiled, with the median seconds of those that are like it. ``num_threads`` sets torch's
    threads, also after the call; ``tier`` is a folder for what is swapped. With ``swaps_optimizer``
    gradients and the optimizer's state are swapped, too.

    Raises InputError for a script that cannot be used, MeterUnavailableError where memory cannot be
    metered.
    """
    installed_meter()  # before the script makes its first tensor
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    swapped = swapped_to(tier) if swaps_optimizer else None
    loop = TrainingLoop(load_script(path), replace(options, num_steps=_MOST_STEPS), swapped)
    end = time.perf_counter() + (LEAST_SECONDS if seconds is None else seconds)
    profiles: list[StepProfile] = []
    with closing(Link(FileTier(tier))) as link:
        for profile in _measured_steps(loop, link):
            profiles.append(profile)
            if len(profiles) >= _FEWEST_STEPS and time.perf_counter() > end:
                break
    return _typical(profiles[1:])


def _measured_steps(loop: TrainingLoop, link: Link) -> Iterator[StepProfile]:
    """Train with everything swapped at once, and measure each step."""
    meter = installed_meter()
    optimizer = loop.optimizer
    swaps_optimizer = isinstance(optimizer, SwappedOptimizer)
    for batch in loop.batches():
        if isinstance(optimizer, SwappedOptimizer):
            optimizer.send_away()
        static_bytes = meter.held_bytes + uncounted_bytes(meter, loop.model, optimizer)
        recorder = StepRecorder(loop.model, meter, static_bytes, SMALLEST_BYTES, swaps_optimizer)
        candidates = Candidates(loop.model, SMALLEST_BYTES)
        step = SwappedStep(None, link, candidates, observer=recorder)
        with recorder.recording():
            with step.hooks():
                loop.backward(batch)
            step.end()
        profile = recorder.profile()
        del recorder, step, batch
        loop.update()
        yield profile


def _typical(profiles: Sequence[StepProfile]) -> StepProfile:
    """The last profile, with the median seconds of those with the same ticks and storages."""
    last = profiles[-1]
    alike = [one for one in profiles if _what(one) == _what(last)]
    if len(alike) < len(profiles):
        warnings.warn(
            f"{len(profiles) - len(alike)} of {len(profiles)} measured steps save other tensors "
            "than the last: a plan fits one kind of step, others swap everything",
            stacklevel=2,
        )
    columns = zip(*(one.seconds for one in alike), strict=True)
    return replace(
        last,
        seconds_before=median(one.seconds_before for one in alike),
        seconds=tuple(median(column) for column in columns),
    )


def _what(profile: StepProfile) -> list[tuple[int, tuple[int, ...]]]:
    """What a step saves, and when."""
    return [(storage.num_bytes, storage.pack_ticks) for storage in profile.storages]
