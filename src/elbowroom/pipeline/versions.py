"""Versions of a stage's weights: which one a minibatch runs with, and how long each is kept.

PipeDream: arXiv 1806.03377 section 3.3, SOSP 2019 section 3.3. An update makes a new version;
minibatches that are on their way keep the one that they were run forward with. Predicted weights:
SpecTrain (arXiv 1809.02839) and linear weight prediction (arXiv 2003.11666), from what the last
update changed, whatever optimizer made it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline import SEMANTICS, Semantics

HORIZON = 2
"""Extrapolation factor: predicted = newest + HORIZON x missing_updates x last_update.

In trials on both models of docs/results/training.md, 2 did better than 1.
"""

Leaves = Mapping[str, torch.Tensor]


class Versions:
    """The parameters of a module in the versions that minibatches still need.

    ``newest`` counts updates. The module's own parameters are the newest version, on which the
    optimizer works in place; a version that is still needed keeps its memory, and the parameters
    move to memory that an older one has left. A predicted version has memory of its own. Parameters
    without a gradient are never copied.
    """

    def __init__(self, module: nn.Module, semantics: Semantics = "stash") -> None:
        if semantics not in SEMANTICS:
            raise InputError(f"semantics '{semantics}' is not one of {', '.join(SEMANTICS)}")
        if semantics == "naive":
            warnings.warn(
                "naive weights: backward passes use other weights than their forward passes did, "
                "so these are not gradients of the loss: for comparison only",
                stacklevel=2,
            )
        self._is_naive = semantics == "naive"
        self._parameters = dict(module.named_parameters())
        self._users: dict[int, int] = {}
        self._spare: list[dict[str, torch.Tensor]] = []
        self.newest = 0
        self._leaves: dict[int, Leaves] = {0: self._make_leaves()}
        self._in_place: int | None = 0  # the version that lies where the parameters do
        self.most_held = 1

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters that take gradients, by name."""
        return {name: p for name, p in self._parameters.items() if p.requires_grad}

    @property
    def held(self) -> int:
        """Number of versions in memory, the parameters among them."""
        return len(self._leaves) + (self._in_place is None)

    def acquire(self, version: int) -> Leaves:
        """The parameters of a version by name, as leaves of a graph; kept until ``release``.

        Raises KeyError for a version that is not kept any more.
        """
        leaves = self._leaves[version]
        self._users[version] = self._users.get(version, 0) + 1
        return leaves

    def release(self, version: int) -> None:
        """Give a version back that ``acquire`` gave, after the backward."""
        self._users[version] -= 1

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[str, torch.Tensor],
        oldest_needed: int | None = None,
        ahead: int = 0,
    ) -> None:
        """Make a new version: update the parameters with these gradients.

        Versions in use stay, and those from ``oldest_needed`` on, which minibatches yet to come
        will ask for. With ``ahead``, minibatches use a prediction in place of the new version: the
        weights after ``ahead`` more updates, if each changed as much as this one.
        """
        self._drop(self.newest + 1 if oldest_needed is None else oldest_needed)
        if self._in_place is not None and not self._is_naive:
            self._move_parameters()
        predicted = self._copy() if ahead else None
        for name, parameter in self.trained.items():
            parameter.grad = gradients.get(name)
        optimizer.step()
        optimizer.zero_grad()
        self.newest += 1
        if predicted is None:
            self._leaves[self.newest], self._in_place = self._make_leaves(), self.newest
        else:
            for name, parameter in self.trained.items():
                predicted[name].lerp_(parameter.data, 1 + ahead)
            self._leaves[self.newest] = self._make_leaves(predicted)
        self.most_held = max(self.most_held, self.held)

    def _drop(self, oldest_needed: int) -> None:
        for version in list(self._leaves):
            if self._users.get(version) or version >= oldest_needed:
                continue
            leaves = self._leaves.pop(version)
            self._users.pop(version, None)
            if version == self._in_place:
                self._in_place = None
            elif not self._is_naive:
                self._spare.append({name: leaves[name].data for name in self.trained})

    def _move_parameters(self) -> None:
        """Move the parameters away from the memory of a version that is still in use."""
        for name, tensor in self._copy().items():
            self._parameters[name].data = tensor
        self._in_place = None

    def _copy(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters as they are, in memory that nobody needs."""
        trained = self.trained
        if self._spare:
            copy = self._spare.pop()
        else:
            copy = {name: torch.empty_like(p.data) for name, p in trained.items()}
        return {name: copy[name].copy_(parameter.data) for name, parameter in trained.items()}

    def _make_leaves(self, predicted: Mapping[str, torch.Tensor] | None = None) -> Leaves:
        """Leaves that share the parameters' memory, or that of ``predicted`` where it has some.

        Autograd does not watch that memory: ``step`` must not change it.
        """
        tensors = {name: parameter.data for name, parameter in self._parameters.items()}
        tensors |= predicted or {}
        return {
            name: tensor.requires_grad_(self._parameters[name].requires_grad)
            for name, tensor in tensors.items()
        }
