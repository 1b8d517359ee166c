"""Measures the model of a training script, on the batch that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.pipeline.layers import trace_model
from elbowroom.pipeline.script import load_script
from elbowroom.pipeline.traced import Tied
from elbowroom.profiling.layers import LEAST_SECONDS, SweepLimits, measure


@dataclass(frozen=True)
class ScriptProfile:
    """A profile, and what a plan for the model has to keep in one stage."""

    graph: LayerGraph
    tied: tuple[Tied, ...]


def profile_script(
    path: Path, seed: int, seconds: float | None = None, num_threads: int | None = None
) -> ScriptProfile:
    """Runs a script and measures for so many seconds (default: ``LEAST_SECONDS``).

    ``seed`` is that of weights and batch; ``num_threads`` are torch's, from here on. Raises
    InputError for a script or batch that cannot be used, UntraceableModelError as ``profile`` does.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    script = load_script(path)
    model = script.make_model(seed).train()
    inputs, targets = script.make_batch(torch.Generator().manual_seed(seed))
    traced = trace_model(model, inputs)
    limits = SweepLimits(seconds=LEAST_SECONDS if seconds is None else seconds)
    return ScriptProfile(measure(traced, inputs, targets, script.loss_fn, limits), traced.tied)
