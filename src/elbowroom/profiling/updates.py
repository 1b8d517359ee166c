"""Measurement of the optimizer's time, shared out among the layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.training.script import OptimizerFunction

_WARM_UP, _TIMED = 2, 5


def update_seconds(parameters: Iterable[nn.Parameter], optimizer_fn: OptimizerFunction) -> float:
    """Median seconds of an optimizer step on copies of all trained parameters.

    The parameters themselves stay as they are.
    """
    copies = [nn.Parameter(one.detach().clone()) for one in parameters if one.requires_grad]
    if not copies:
        return 0.0
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    optimizer = optimizer_fn(copies)
    seconds = []
    for _ in range(_WARM_UP + _TIMED):
        begin = time.perf_counter()
        optimizer.step()
        if copies[0].is_cuda:
            torch.cuda.synchronize(copies[0].device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[_WARM_UP:])


def with_updates(graph: LayerGraph, seconds: float) -> LayerGraph:
    """The graph with update times, in proportion to the bytes of weights.

    An update reads and writes each weight a few times.
    """
    total = sum(layer.parameter_bytes for layer in graph.layers) or 1
    layers = tuple(
        replace(layer, update_seconds=seconds * layer.parameter_bytes / total)
        for layer in graph.layers
    )
    return replace(graph, layers=layers)
