"""The loss of a minibatch whose outputs lie on several workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError
from elbowroom.grid.flags import LossPlace
from elbowroom.grid.interpreter import SECTIONS, GridModel
from elbowroom.grid.moves import moved
from elbowroom.grid.parts import Part, cut
from elbowroom.grid.transport import Channel, Sum
from elbowroom.plans.grid_layout import Layout, whole
from elbowroom.training.values import copy_of

LossFunction = Callable[[Any, Any], torch.Tensor]

_RELATIVE_ERROR, _GRADIENT_ERROR = 1e-3, 1e-2
"""Of the shares' sum, and of their gradients' norm, which bfloat16 rounds by 0.004."""

LOSS = "loss"
"""What is sent for a loss is counted by this name."""


@dataclass(frozen=True, eq=False)
class LocalLoss:
    """One worker's share of a loss: its own value times the share of elements that it has.

    ``total`` is the sum of all workers' shares, on its way while the backward runs; None where each
    worker has the whole loss.
    """

    share: torch.Tensor
    total: Sum | None


class _Probe(NamedTuple):
    """A loss, and its gradient by each result; None by one that it does not depend on."""

    value: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


class GridLoss:
    """A script's loss function on parts of the outputs.

    Args:
        loss_fn: gives a mean over samples; in ``space``, over samples and rows.
        place: where it is taken. ``whole`` is right for every loss function.
        channel: to the other workers.

    """

    def __init__(self, loss_fn: LossFunction, place: LossPlace, channel: Channel) -> None:
        self._loss_fn, self._place, self._channel = loss_fn, place, channel
        self._used: frozenset[str] | None = None  # results on which the loss depends, when known

    def share(self, model: GridModel, results: Mapping[str, Any], targets: Any) -> LocalLoss:
        """The share of this worker, to be differentiated, of what the model's results are.

        Raises InputError, with the first minibatch, if shares or their gradients do not add up to
        those of the whole, and for a loss that is no number.
        """
        self._channel.at(LOSS, SECTIONS * len(model.operations))
        parts = [part for part in results.values() if isinstance(part, Part) and part.shape]
        homes = {part.layout.workers for part in parts}
        if self._place == "whole" or len(parts) < len(results) or len(homes) > 1:
            values = self._gathered(results)
            return LocalLoss(self._of(self._outputs(model, values), targets), None)
        layouts = self._layouts(model, results)
        local = {name: moved(part, layouts[name], self._channel) for name, part in results.items()}
        if self._used is None:
            self._check(model, results, local, targets)
        return self._share(model, local, targets)

    def total(self, shared: LocalLoss) -> float:
        """The loss of the whole minibatch, the same on all workers."""
        found = shared.share.detach() if shared.total is None else shared.total.finish()
        return found.item()

    def _local(self, share: torch.Tensor, *, counts: bool) -> LocalLoss:
        """A share, and its sum; replicas of the same share count once."""
        own = share.detach().reshape(1)
        return LocalLoss(share, self._sum(own if counts else torch.zeros_like(own)))

    def _sum(self, own: torch.Tensor) -> Sum:
        """The sum over all workers, in double precision whatever type each has."""
        route, everyone = self._channel.route("SUM"), range(self._channel.num_workers)
        return Sum(own.double(), everyone, self._channel, route, "forward")

    def _share(self, model: GridModel, local: Mapping[str, Part], targets: Any) -> LocalLoss:
        one = next(iter(local.values()))
        if not one.local.numel():
            assert self._used is not None  # by other results no worker sends gradients
            nothing = [local[name].local.sum() * 0 for name in local if name in self._used]
            return self._local(torch.stack(nothing).sum(), counts=False)
        values = {name: part.local for name, part in local.items()}
        loss = self._of(self._outputs(model, values), self._own_targets(model, local, targets))
        return self._local(loss * _share_of(one), counts=_is_first(one))

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

    def _gathered(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the results, whole."""
        values = {}
        for name, value in results.items():
            if isinstance(value, Part):
                layout = whole(range(self._channel.num_workers), len(value.shape))
                value = moved(value, layout, self._channel).local
            values[name] = value
        return values

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

    def _own_targets(self, model: GridModel, local: Mapping[str, Part], targets: Any) -> Any:
        """The targets of this worker's samples and rows; a tensor of other sizes stays whole."""
        name, output = next(iter(local.items()))
        features = model.shapes.by_name[name].features
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
        self,
        model: GridModel,
        results: Mapping[str, Any],
        local: Mapping[str, Part],
        targets: Any,
    ) -> None:
        """Compare all workers' shares with the loss of the whole; note on which results it depends.

        Losses alone do not tell: a model that knows nothing yet has the same loss of every sample.
        """
        with torch.no_grad():
            gathered = self._gathered(results)
        expected = self._probe(model, gathered, targets)
        self._used = frozenset(n for n, found in expected.gradients.items() if found is not None)
        sums = torch.zeros(3, dtype=torch.float64)  # losses, squares of errors and of gradients
        one = next(iter(local.values()))
        if one.local.numel() and _is_first(one):
            values = {name: part.local for name, part in local.items()}
            own = self._probe(model, values, self._own_targets(model, local, targets))
            sums[0] = own.value.double() * _share_of(one)
            for name in self._used:
                right, found = expected.gradients[name], own.gradients[name]
                assert right is not None
                right = cut(right, local[name].box).double()
                error = right if found is None else right - found.double() * _share_of(one)
                sums[1] += error.square().sum().cpu()
                sums[2] += right.square().sum().cpu()
        total, error_squared, size_squared = self._sum(sums).finish().tolist()
        value = expected.value.item()
        _check_shares(total, value, math.sqrt(error_squared), math.sqrt(size_squared))

    def _probe(self, model: GridModel, values: Mapping[str, torch.Tensor], targets: Any) -> _Probe:
        """The loss of some values, apart from the graph of the step."""
        leaves = {
            name: value.detach().requires_grad_(value.is_floating_point())
            for name, value in values.items()
        }
        copies = {name: leaf.clone() for name, leaf in leaves.items()}  # it may write into them
        loss = self._of(self._outputs(model, copies), copy_of(targets))
        by = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(loss, [*by.values()], allow_unused=True)
        return _Probe(loss.detach(), dict(zip(by, gradients, strict=True)))


def _share_of(part: Part) -> float:
    """Share of the elements that this worker has."""
    return part.local.numel() / math.prod(part.shape)


def _is_first(part: Part) -> bool:
    """Whether this worker is the first of those that have this part."""
    return part.layout.group(part.worker, part.layout.replicas)[0] == part.worker


def _check_shares(total: float, expected: float, error: float, size: float) -> None:
    """Raise InputError where shares, or their gradients, are not those of the loss of the whole."""
    one, other = torch.tensor([total]), torch.tensor([expected])
    if not torch.isclose(one, other, rtol=_RELATIVE_ERROR, atol=1e-6, equal_nan=True):
        what = f"adds up to {total:.6g}, and that of all outputs is {expected:.6g}"
    elif error > _GRADIENT_ERROR * size:
        what = f"has a gradient that is off by {error:.3g}, of a norm of {size:.3g}"
    else:
        return
    raise InputError(
        f"the loss of the workers' shares {what}: loss_fn is no mean over samples. Take it of the "
        f"whole (GridOptions(loss='whole'), --loss whole)"
    )
