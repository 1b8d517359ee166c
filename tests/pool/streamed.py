"""A stack of products of which some come through a streamer, for a GPU and for its stand-in."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.streamer import DeviceStreamer

NUM_LAYERS = 8
LAYERS = (1, 2, 4, 5, 7)  # those that a rank borrows
FETCHES = [Fetch(layer, 0, 1) for layer in LAYERS]


def published(weights: torch.Tensor) -> dict[int, torch.Tensor]:
    """Copies of the borrowed layers' weights, as uint8."""
    return {layer: weights[layer].clone().view(-1).view(torch.uint8) for layer in LAYERS}


def run_streamed(
    streamer: DeviceStreamer, weights: Iterable[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Multiply ``x`` with all weights in turn, the borrowed ones from their slots."""
    for layer, weight in enumerate(weights):
        if layer in LAYERS:
            slot = streamer.acquire(layer)
            x = torch.tanh(x @ slot.buffer.view(weight.dtype).view(weight.shape))
            streamer.release(slot)
        else:
            x = torch.tanh(x @ weight)
    return x


def run_plainly(weights: Iterable[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Multiply ``x`` with all weights in turn."""
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x
