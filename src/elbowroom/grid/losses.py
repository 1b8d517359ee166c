"""The loss of a minibatch whose outputs lie on several workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.grid.interpreter import SECTIONS, GridModel
from elbowroom.grid.moves import moved
from elbowroom.grid.parts import Part, cut
from elbowroom.grid.transport import Channel, all_sum
from elbowroom.plans.grid_layout import Layout, whole
from elbowroom.training.values import copy_of

LossPlace = Literal["batch", "space", "whole"]
"""Where a loss is taken: of each worker's samples; of its samples and rows; of all on each."""

LOSS_PLACES: tuple[LossPlace, ...] = ("batch", "space", "whole")

LossFunction = Callable[[Any, Any], torch.Tensor]

_RELATIVE_ERROR = 1e-3
LOSS = "loss"
"""What is sent for a loss is counted by this name."""


@dataclass(frozen=True, eq=False)
class LocalLoss:
    """One worker's share of a loss: its own value times the share of elements that it has.

    ``counts`` is whether it is in the sum of all workers', which replicas of the same share are
    once; None where each worker has the whole loss.
    """

    share: torch.Tensor
    counts: bool | None


class GridLoss:
    """A script's loss function on parts of the outputs.

    Args:
        loss_fn: gives a mean over samples; in ``space``, over samples and rows.
        place: where it is taken. ``whole`` is right for every loss function.
        channel: to the other workers.

    """

    def __init__(self, loss_fn: LossFunction, place: LossPlace, channel: Channel) -> None:
        self._loss_fn, self._place, self._channel = loss_fn, place, channel
        self._is_checked = False

    def share(self, model: GridModel, results: Mapping[str, Any], targets: Any) -> LocalLoss:
        """The share of this worker, to be differentiated, of what the model's results are.

        Raises InputError, with the first minibatch, if shares do not add up to the loss of the
        whole, and for a loss that is no number.
        """
        self._channel.at(LOSS, SECTIONS * len(model.operations))
        shared = self._share(model, results, targets)
        if not self._is_checked and shared.counts is not None:
            self._check(shared, model, results, targets)
        self._is_checked = True
        return shared

    def total(self, shared: LocalLoss) -> float:
        """The loss of the whole minibatch, the same on all workers."""
        return self._sum(shared).item()

    def _sum(self, shared: LocalLoss) -> torch.Tensor:
        own = shared.share.detach().reshape(1)
        if shared.counts is None:
            return own.squeeze()
        route, everyone = self._channel.route("SUM"), range(self._channel.num_workers)
        own = own if shared.counts else torch.zeros_like(own)
        return all_sum(own, everyone, self._channel, route, "forward").squeeze()

    def _share(self, model: GridModel, results: Mapping[str, Any], targets: Any) -> LocalLoss:
        parts = [part for part in results.values() if isinstance(part, Part) and part.shape]
        homes = {part.layout.workers for part in parts}
        if self._place == "whole" or len(parts) < len(results) or len(homes) > 1:
            return LocalLoss(self._of_whole(model, results, targets), None)
        layouts = self._layouts(model, results)
        local = {name: moved(part, layouts[name], self._channel) for name, part in results.items()}
        name, one = next(iter(local.items()))
        ours = one.layout.local_shape(one.worker, one.shape)
        share = math.prod(ours) / math.prod(one.shape)
        if share == 0:
            nothing = [part.local.sum() * 0 for part in local.values()]
            return LocalLoss(torch.stack(nothing).sum(), counts=False)
        own_targets = self._cut_targets(targets, one, model.shapes.by_name[name].features)
        loss = self._of(self._outputs(model, {n: p.local for n, p in local.items()}), own_targets)
        is_first = one.layout.group(one.worker, one.layout.replicas)[0] == one.worker
        return LocalLoss(loss * share, is_first)

    def _layouts(self, model: GridModel, results: Mapping[str, Part]) -> dict[str, Layout]:
        """Where the loss needs the results: features whole, the rest as in the first of them."""
        first_name, first = next(iter(results.items()))
        last = len(first.shape) if self._place == "space" else 1
        kept = {dim: first.layout.dims[dim] for dim in range(last)}
        kept.pop(model.shapes.by_name[first_name].features, None)
        found = {}
        for name, part in results.items():
            features = model.shapes.by_name[name].features
            found[name] = part.layout.with_dims(
                kept.get(dim, ())
                if dim != features and first.shape[dim : dim + 1] == (size,)
                else ()
                for dim, size in enumerate(part.shape)
            )
        return found

    def _of_whole(self, model: GridModel, results: Mapping[str, Any], targets: Any) -> torch.Tensor:
        values = {}
        for name, value in results.items():
            if isinstance(value, Part):
                layout = whole(range(self._channel.num_workers), len(value.shape))
                value = moved(value, layout, self._channel).local
            values[name] = value
        return self._of(self._outputs(model, values), targets)

    def _of(self, outputs: Any, targets: Any) -> torch.Tensor:
        loss = self._loss_fn(outputs, targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InputError("loss_fn must return a tensor of one number")
        return loss.reshape(())

    def _outputs(self, model: GridModel, values: Mapping[str, Any]) -> Any:
        """What the model returns, from values of its result layers."""
        traced = model.traced
        interpreter = fx.Interpreter(traced.graph.module)
        for name, value in values.items():
            node = traced.by_name[name].node
            assert node is not None
            interpreter.env[node] = value
        *before, output = traced.output_nodes
        for node in before:
            if node not in interpreter.env:
                interpreter.env[node] = interpreter.run_node(node)
        found: Any = fx.map_arg(output.args[0], interpreter.env.__getitem__)
        spec = traced.graph.result
        return found if spec is None else pytree.tree_unflatten(found, spec)

    def _cut_targets(self, targets: Any, output: Part, features: int) -> Any:
        """The targets of this worker's samples and rows; a tensor of other sizes stays whole."""
        shape, dims = output.shape, output.layout.dims
        spatial = shape[:features] + shape[features + 1 :]

        def cut_target(target: torch.Tensor) -> torch.Tensor:
            sizes = tuple(target.shape)
            if sizes[:1] != shape[:1]:
                return target
            if sizes == shape:
                cuts = dims
            elif sizes == spatial:
                cuts = dims[:features] + dims[features + 1 :]
            else:
                cuts = (dims[0], *((),) * (len(sizes) - 1))
                if output.layout.used != tuple(sorted(dims[0])):
                    raise InputError(
                        f"a target of shape {[*sizes]} cannot be cut as outputs of {[*shape]}: "
                        f"take the loss of the batch"
                    )
            return cut(target, output.layout.with_dims(cuts).box(output.worker, sizes))

        return pytree.tree_map_only(torch.Tensor, cut_target, targets)

    def _check(
        self, shared: LocalLoss, model: GridModel, results: Mapping[str, Any], targets: Any
    ) -> None:
        total = self._sum(shared).double()
        with torch.no_grad():
            expected = self._of_whole(model, results, copy_of(targets)).double()
        if not torch.isclose(total, expected, rtol=_RELATIVE_ERROR, atol=1e-6, equal_nan=True):
            raise InputError(
                f"the loss of the workers' shares adds up to {total.item():.6g}, and that of all "
                f"outputs is {expected.item():.6g}: loss_fn is no mean over samples. Take it of "
                f"the whole (GridOptions(loss='whole'), --loss whole)"
            )
