"""Seconds of layers, as they were measured, in the shapes of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elbowroom.profiling.layers import SweepLimits, measure
from elbowroom.profiling.shapes import with_seconds
from elbowroom.training.layers import trace_model
from elbowroom.training.operations.find import shapes_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Two(nn.Module):
    """With two results, so that there is a layer ``output``."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.two(x)


def loss_fn(outputs: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return ((outputs[0] - outputs[1] - target) ** 2).mean()


def test_all_seconds_are_kept() -> None:
    inputs = torch.randn(3, 6)
    traced = trace_model(Two(), inputs, leaves=True)
    graph = measure(traced, inputs, torch.zeros(3, 4), loss_fn, SweepLimits(1, 0.0), None)
    shapes = with_seconds(shapes_of(traced), graph)
    assert [layer.name for layer in graph.layers] == ["x", "one", "two", "output"]
    assert [layer.name for layer in shapes.layers] == ["x", "one", "two"]
    assert shapes.results == ("one", "two")
    for name in ("forward_seconds", "backward_seconds"):
        seconds = [getattr(layer, name) for layer in graph.layers]
        assert [getattr(layer, name) for layer in shapes.layers] == [
            *seconds[:2],
            seconds[2] + seconds[3],
        ]
        assert seconds[3] > 0
