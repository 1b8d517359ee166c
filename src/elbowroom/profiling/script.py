"""Profile of a training script's model, on the batch that the script makes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.profiling.background_load import background_load
from elbowroom.profiling.layers import LEAST_SECONDS, LossFn, SweepLimits, measure
from elbowroom.training.layers import trace_model
from elbowroom.training.outcome import in_training
from elbowroom.training.script import OptimizerFunction, load_script
from elbowroom.training.traced import TracedModel
from elbowroom.training.tracing import RECOMPUTE_DROPPED


@dataclass(frozen=True, eq=False)
class Subject:
    """A script's model, ready to be measured on one of its batches."""

    traced: TracedModel
    inputs: Any
    targets: Any
    loss_fn: LossFn
    optimizer_fn: OptimizerFunction | None

    def measure(self, limits: SweepLimits) -> LayerGraph:
        return measure(
            self.traced, self.inputs, self.targets, self.loss_fn, limits, self.optimizer_fn
        )


def profile_script(
    path: Path,
    seed: int,
    seconds: float | None = None,
    num_threads: int | None = None,
    num_workers: int = 1,
) -> LayerGraph:
    """Run a script and measure its model for ``seconds`` (default: ``LEAST_SECONDS``).

    ``seed`` is for weights and batch. ``num_threads`` sets torch's threads, also after the call.
    All but one of ``num_workers`` are background load that does the same: they share caches and
    memory, as workers that train on one machine do. Raises InputError for a script or batch that
    cannot be used, UntraceableModelError as ``profile`` does, MeasuringError if a background
    process does not start or ends early.
    """
    subject = load_subject(path, seed, num_threads)
    limits = SweepLimits(seconds=LEAST_SECONDS if seconds is None else seconds)
    with background_load(num_workers - 1, path, seed, torch.get_num_threads()):
        return subject.measure(limits)


def load_subject(
    path: Path, seed: int, num_threads: int | None, *, leaves: bool = False
) -> Subject:
    """Load a script's model and batch, and trace it, down to ``leaves`` if asked.

    Raises as ``profile_script`` does.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    script = load_script(path)
    model = in_training(script.make_model(seed))
    inputs, targets = script.make_batch(torch.Generator().manual_seed(seed))
    traced = trace_model(model, inputs, leaves=leaves)
    if traced.graph.recompute == "dropped":
        warnings.warn(RECOMPUTE_DROPPED, stacklevel=2)
    return Subject(traced, inputs, targets, script.loss_fn, script.optimizer_fn())
