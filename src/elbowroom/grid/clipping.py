"""The norm of all gradients of a model whose weights are slices on several workers."""

from __future__ import annotations

import torch

from elbowroom.grid.transport import LATER_KEYS, Channel, Route, all_sum
from elbowroom.grid.weights import Weights

_MARGIN = 1e-6
"""Added to norms before they divide, as ``torch.nn.utils.clip_grad_norm_`` does."""

NORM = "norm of gradients"
"""What is sent for it is counted by this name."""


def clip_gradients(weights: Weights, limit: float, channel: Channel) -> float:
    """Scale all gradients so that their norm is at most ``limit``; gives the norm before.

    Each element counts once, whoever has it: slices where their first owner is this worker, whole
    parameters on the first worker. Every worker must call it. Raises PeerLostError.
    """
    parameters = weights.parameters
    own = torch.zeros(1, dtype=torch.float64)
    for name, parameter in parameters.items():
        if parameter.grad is not None and weights.owner(name) == channel.worker:
            own += parameter.grad.double().square().sum()
    everyone = range(channel.num_workers)
    route = Route(NORM, LATER_KEYS - 2, "SUM")
    total = all_sum(own, everyone, channel, route, "update")
    norm = total.sqrt().item()
    scale = limit / (norm + _MARGIN)
    if not scale >= 1:  # nor for NaN, which is then in all gradients, as torch has it
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return norm
