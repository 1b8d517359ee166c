"""Versions of a stage's weights: which one a minibatch runs with, and how long each is kept.

PipeDream: arXiv 1806.03377 section 3.3, SOSP 2019 section 3.3. An update makes a new version;
minibatches that are on their way keep the one that they were run forward with.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import nn

from elbowroom.core.errors import InputError

Semantics = Literal["stash", "vertical-sync", "flush", "naive"]
"""Which version a minibatch uses at a stage.

``stash``: forward and backward the one that was newest at its forward. ``vertical-sync``: the one
that was newest at the first stage. ``flush``: none is updated while a minibatch is on its way.
``naive``: at each pass the newest.
"""

SEMANTICS: tuple[Semantics, ...] = get_args(Semantics)

Leaves = Mapping[str, torch.Tensor]


class Versions:
    """The parameters of a module, as they were before each of the last updates.

    ``newest`` counts updates. The module's own parameters are the newest version, on which the
    optimizer works in place; a version that is still needed keeps its memory, and the parameters
    move to memory that an older one has left. Parameters without a gradient are never copied.
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
        self._spare: list[list[torch.Tensor]] = []
        self.newest = 0
        self._leaves: dict[int, Leaves] = {0: self._make_leaves()}
        self.most_held = 1

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Those that take gradients, by name."""
        return {name: p for name, p in self._parameters.items() if p.requires_grad}

    @property
    def held(self) -> int:
        """Versions in memory, the newest among them."""
        return len(self._leaves)

    def acquire(self, version: int) -> Leaves:
        """Parameters by name, as leaves of a graph, as they were; kept until ``release``.

        Raises KeyError for a version that is not kept any more.
        """
        leaves = self._leaves[version]
        self._users[version] = self._users.get(version, 0) + 1
        return leaves

    def release(self, version: int) -> None:
        """A backward pass is done with it."""
        self._users[version] -= 1

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Mapping[str, torch.Tensor],
        oldest_needed: int | None = None,
    ) -> None:
        """Update the parameters with these gradients: a new version.

        Versions in use stay, and those from ``oldest_needed`` on, which minibatches yet to come
        will ask for.
        """
        self._drop(self.newest + 1 if oldest_needed is None else oldest_needed)
        if self.newest in self._leaves and not self._is_naive:
            self._move_parameters()
        for name, parameter in self.trained.items():
            parameter.grad = gradients.get(name)
        optimizer.step()
        optimizer.zero_grad()
        self.newest += 1
        self._leaves[self.newest] = self._make_leaves()
        self.most_held = max(self.most_held, self.held)

    def _drop(self, oldest_needed: int) -> None:
        for version in list(self._leaves):
            if self._users.get(version) or version >= oldest_needed:
                continue
            leaves = self._leaves.pop(version)
            self._users.pop(version, None)
            if version != self.newest and not self._is_naive:
                self._spare.append([leaves[name].data for name in self.trained])

    def _move_parameters(self) -> None:
        """Away from the newest version's memory, which somebody still reads."""
        parameters = list(self.trained.values())
        if self._spare:
            targets = self._spare.pop()
        else:
            targets = [torch.empty_like(p.data) for p in parameters]
        for parameter, target in zip(parameters, targets, strict=True):
            parameter.data = target.copy_(parameter.data)

    def _make_leaves(self) -> dict[str, torch.Tensor]:
        """On the parameters' memory, which autograd does not watch: ``step`` must not change it."""
        return {
            name: parameter.data.requires_grad_(parameter.requires_grad)
            for name, parameter in self._parameters.items()
        }
