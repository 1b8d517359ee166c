"""Shapes of a model's layers, with the seconds that each takes: what a planner of grids needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.profiling.background_load import background_load
from elbowroom.profiling.layers import LEAST_SECONDS, SweepLimits
from elbowroom.profiling.script import load_subject
from elbowroom.training.operations.find import shapes_of


def profile_shapes(
    path: Path,
    seed: int,
    seconds: float | None = None,
    num_threads: int | None = None,
    num_workers: int = 1,
) -> ModelShapes:
    """Run a script, find out what its model's layers do, and measure them.

    Arguments and errors are those of ``profile_script``. Raises InputError, too, for a model that
    ``operations_of`` refuses.
    """
    subject = load_subject(path, seed, num_threads, leaves=True)
    shapes = shapes_of(subject.traced)
    limits = SweepLimits(seconds=LEAST_SECONDS if seconds is None else seconds)
    with background_load(num_workers - 1, path, seed, torch.get_num_threads()):
        return with_seconds(shapes, replace(subject, optimizer_fn=None).measure(limits))


def with_seconds(shapes: ModelShapes, graph: LayerGraph) -> ModelShapes:
    """The same with each layer's seconds as they were measured; the last one's are the loss's, too.

    A layer ``output``, where there is one, has only the loss's, which go to the last before it.
    """
    measured = {layer.name: layer for layer in graph.layers}
    layers = [
        replace(
            layer,
            forward_seconds=measured[layer.name].forward_seconds,
            backward_seconds=measured[layer.name].backward_seconds,
        )
        for layer in shapes.layers
    ]
    for extra in graph.layers[len(layers) :]:
        last = layers[-1]
        layers[-1] = replace(
            last,
            forward_seconds=last.forward_seconds + extra.forward_seconds,
            backward_seconds=last.backward_seconds + extra.backward_seconds,
        )
    return replace(shapes, layers=tuple(layers))
