"""Sums of gradients over the workers that share a parameter, begun as the backward has them."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from torch import nn

from elbowroom.grid.transport import LATER_KEYS, Channel, Route, Sum
from elbowroom.grid.weight_parts import WeightUse
from elbowroom.plans.grid_traffic import JOINED_GRADIENT, SMALL_WEIGHTS, joined


class _Sharers(NamedTuple):
    """Workers that sum gradients of one type."""

    workers: tuple[int, ...]
    dtype: torch.dtype


class _Joint:
    """Parameters whose gradients are summed in one, and those that have a gradient by now."""

    def __init__(self, sharers: _Sharers, names: list[str]) -> None:
        self.sharers, self.names = sharers, names
        self.ready: set[str] = set()


class GradientSums:
    """Sums of gradients that run while the backward goes on.

    Large gradients are summed one by one, those of products where they are: autograd made them for
    that parameter alone, and others may be views of one tensor. Small ones of the same workers are
    copied into one, of as many layers as ``joined`` says: what they take is messages, not bytes.
    All parameters are added, layer by layer, before ``begin``.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._parameters: dict[str, nn.Parameter] = {}
        self._routes: dict[str, Route] = {}
        self._layers: dict[_Sharers, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._joint: list[_Joint] = []
        self._begun: list[tuple[list[str], Sum]] = []

    def add(
        self, parameter: nn.Parameter, use: WeightUse, workers: tuple[int, ...], number: int
    ) -> None:
        """Sum a parameter's gradient over workers; ``number`` is its own, the same on all."""
        self._parameters[use.name] = parameter
        self._routes[use.name] = Route(f"weights of {use.name}", LATER_KEYS + 2 * number, "SUM")
        if parameter.numel() <= JOINED_GRADIENT:
            self._layers[_Sharers(workers, parameter.dtype)][use.layer].append(use.name)
            return

        def start(_: torch.Tensor) -> None:
            assert parameter.grad is not None, "the backward just made it"
            summed = parameter.grad if use.is_product else parameter.grad.clone()
            self._start([use.name], summed, workers, self._routes[use.name])

        parameter.register_post_accumulate_grad_hook(start)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Join small gradients, of all that were added."""
        for sharers, layers in self._layers.items():
            sizes = Counter[str]()
            for layer, names in layers.items():
                sizes[layer] = sum(self._parameters[name].numel() for name in names)
            for some in joined(sizes):
                joint = _Joint(sharers, [name for layer in some for name in layers[layer]])
                self._joint.append(joint)
                for name in joint.names:
                    self._start_with_last(joint, name)

    def finish(self) -> None:
        """Put the sums where the gradients were. Raises PeerLostError."""
        for joint in self._joint:  # where some had no gradient
            self._start_joint(joint)
        for _, sum_ in self._begun:
            sum_.advance()
        for names, sum_ in self._begun:
            parameters = [self._parameters[name] for name in names]
            sizes = [parameter.numel() for parameter in parameters]
            for parameter, piece in zip(
                parameters, torch.split(sum_.finish().view(-1), sizes), strict=True
            ):
                parameter.grad = piece.view(parameter.shape)
        self._begun.clear()
        self._channel.transport.drain()  # gradients may now be written into

    def _start_with_last(self, joint: _Joint, name: str) -> None:
        def start(_: torch.Tensor) -> None:
            joint.ready.add(name)
            if len(joint.ready) == len(joint.names):
                self._start_joint(joint)

        self._parameters[name].register_post_accumulate_grad_hook(start)  # type: ignore[no-untyped-call]

    def _start_joint(self, joint: _Joint) -> None:
        names = [name for name in joint.names if name in joint.ready]
        joint.ready.clear()
        if names:
            gradients = [self._parameters[name].grad for name in names]
            summed = torch.cat([each.reshape(-1) for each in gradients if each is not None])
            route = self._routes[names[0]]._replace(layer=SMALL_WEIGHTS)
            self._start(names, summed, joint.sharers.workers, route)

    def _start(
        self, names: list[str], summed: torch.Tensor, workers: tuple[int, ...], route: Route
    ) -> None:
        self._begun.append((names, Sum(summed, workers, self._channel, route, "update")))
