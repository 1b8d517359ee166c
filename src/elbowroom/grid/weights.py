"""Parameters of one worker: its slices, what it has whole, and sums of gradients over workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.grid.gradient_sums import GradientSums
from elbowroom.grid.transport import Channel, Route, all_sum
from elbowroom.grid.weight_parts import WeightUse, cut_intervals

_UPDATED = ("running_mean", "running_var")
"""Buffers of which each worker updates its part."""


class Weights:
    """The parameters and buffers of a model, as one worker of a grid has them.

    A parameter that one layer uses, as a factor of its product, is stored as this worker's slice;
    others are whole on every worker. ``local`` has them by their names in the model. Gradients are
    summed over workers that use the same on other samples or rows, by ``sums``: as soon as the
    backward has them, and until ``sums.finish``.

    ``slices`` tells how each stored slice is cut, ``partial`` which part of a buffer this worker
    keeps up to date: running statistics of its channels.
    """

    def __init__(self, model: nn.Module, uses: Iterable[WeightUse], channel: Channel) -> None:
        self._channel = channel
        self._uses = {(use.layer, use.role): use for use in uses}
        counts = Counter(use.name for use in self._uses.values())
        self._is_shared = {name: count > 1 for name, count in counts.items()}
        self.sums = GradientSums(channel)
        self.slices: dict[str, WeightUse] = {}
        buffers = dict(model.named_buffers())
        self.partial = {
            use.name: use for use in self._uses.values() if use.name in buffers and use.is_split
        }
        self.local: dict[str, torch.Tensor] = {**buffers}
        parameters = dict(model.named_parameters())
        self._by_name = {use.name: use for use in self._uses.values()}
        _check_shared(self._uses.values())
        for name, parameter in parameters.items():
            use = self._by_name.get(name)
            if use is not None and self._is_sliced(use):
                self.slices[name] = use
                self.local[name] = self._sliced(parameter, use)
            else:
                self.local[name] = parameter
        self._begin_sums([*parameters])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, as an optimizer is given them."""
        found = self.local.items()
        return {name: each for name, each in found if isinstance(each, nn.Parameter)}

    def use(self, layer: str, role: str) -> torch.Tensor | None:
        """The part of a layer's parameter or buffer that this worker uses; None without one."""
        use = self._uses.get((layer, role))
        if use is None:
            return None
        local = self.local[use.name]
        if use.name in self.slices:
            return local
        is_trained = isinstance(local, nn.Parameter) and local.requires_grad
        if is_trained and self._is_shared[use.name] and use.users:
            route = self._channel.route("SUM")
            arguments = (local, self._workers(use, use.users), self._channel, route)
            local = _Entered.apply(*arguments)  # type: ignore[no-untyped-call]
        return cut_intervals(local, use.part(self._channel.worker)) if use.is_split else local

    def _workers(self, use: WeightUse, digits: tuple[int, ...]) -> tuple[int, ...]:
        """Workers that differ from this one in these digits only, in the order of sums."""
        return tuple(sorted(use.layout.group(self._channel.worker, digits)))

    def home(self, name: str) -> range:
        """Workers that train a parameter, or keep a buffer up to date: all that have its layer."""
        use = self._by_name.get(name)
        return range(self._channel.num_workers) if use is None else use.layout.workers

    def owner(self, name: str) -> int:
        """The first worker that has the same part of a parameter as this one."""
        use = self.slices.get(name)
        return self.home(name).start if use is None else use.owner(self._channel.worker)

    def _is_sliced(self, use: WeightUse) -> bool:
        """Whether workers store a part of a parameter, or some of them nothing of it."""
        is_part = use.is_split or len(use.layout.workers) < self._channel.num_workers
        return use.is_product and is_part and not self._is_shared[use.name]

    def _sliced(self, parameter: nn.Parameter, use: WeightUse) -> nn.Parameter:
        part = cut_intervals(parameter.detach(), use.part(self._channel.worker)).clone()
        parameter.data = parameter.data.new_empty(0)
        return nn.Parameter(part.contiguous(), requires_grad=parameter.requires_grad)

    def _begin_sums(self, names: list[str]) -> None:
        """Have gradients summed, layer by layer, of parameters with these names."""
        number = {name: k for k, name in enumerate(names)}
        for name, use in self._by_name.items():
            workers, local = self._workers(use, use.sharers), self.local[name]
            if not isinstance(local, nn.Parameter) or not local.requires_grad:
                continue
            if len(workers) > 1 and not self._is_shared[name]:
                self.sums.add(local, use, workers, number[name])
        self.sums.begin()


def _check_shared(uses: Iterable[WeightUse]) -> None:
    """Raise InputError for what layers on unlike workers use, or update in unlike parts."""
    first: dict[str, WeightUse] = {}
    for use in uses:
        other = first.setdefault(use.name, use)
        if other.layout.workers != use.layout.workers:
            raise InputError(
                f"'{use.name}' is used by layers '{other.layer}' and '{use.layer}', which the plan "
                f"gives to other workers: give them the same"
            )
        if use.role in _UPDATED and other.layout != use.layout:
            raise InputError(
                f"'{use.name}' is updated by layers '{other.layer}' and '{use.layer}', to "
                f"which the plan gives other channels: give the layers before them the same grid"
            )


class _Entered(torch.autograd.Function):
    """A whole parameter that several layers use: each sums its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, workers: tuple[int, ...], channel: Channel, route: Route
    ) -> torch.Tensor:
        ctx.about = workers, channel, route
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        workers, channel, route = ctx.about
        return all_sum(gradient, workers, channel, route, "backward"), None, None, None
