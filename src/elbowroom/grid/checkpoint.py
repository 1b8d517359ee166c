"""Checkpoints of a model on a grid: whole tensors, which any grid, a pipeline and the model read.

The slices of each parameter, and of its optimizer's state, go to one worker, another for each
parameter, which writes them as one tensor. A worker so holds a fair share of the whole model while
it writes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from elbowroom.core.errors import InputError
from elbowroom.grid.transport import Channel
from elbowroom.grid.weight_parts import WeightUse, cut_intervals, put_intervals
from elbowroom.grid.weights import Weights
from elbowroom.training.checkpoint import Checkpoint, save
from elbowroom.training.checkpoint_content import StageContent, settings_of

GATHERED = "checkpoint"
"""What is sent for a checkpoint is counted by this name."""


class GridState:
    """All that a checkpoint of a grid holds: weights, buffers, optimizer and scheduler.

    ``kept`` are the names of the buffers that a model's ``state_dict`` has.
    """

    def __init__(
        self,
        weights: Weights,
        kept: frozenset[str],
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        channel: Channel,
    ) -> None:
        self._weights, self._kept = weights, kept
        self._optimizer, self._scheduler = optimizer, scheduler
        self._channel = channel

    def save(self, folder: Path, steps: int, run: dict[str, Any]) -> Path:
        """Write a checkpoint; every worker must call it.

        Raises OutputError, PeerLostError, and InputError for an optimizer whose state of a slice
        has another shape.
        """
        self._channel.begin_step()
        tensors: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self._names()):
            self._channel.at(GATHERED, number)  # optimizers keep nothing for layers of others
            home = self._weights.home(name)
            writer = home[number % len(home)]
            for key, tensor in self._tensors_of(name).items():
                whole = self._gathered(tensor.detach(), self._split(name, tensor), writer)
                if whole is not None:
                    tensors[key] = whole
        settings = None
        if self._channel.worker == 0:
            names = {one: name for name, one in self._weights.parameters.items()}
            settings = settings_of(names, self._optimizer, self._scheduler)
        content = StageContent(tensors, settings)
        return save(folder, self._channel.worker, content, steps, steps, run)

    def load(self, checkpoint: Checkpoint, aliases: dict[str, list[str]]) -> None:
        """Take this worker's parts of a checkpoint of whatever grid or stages.

        ``aliases`` are the other names of tied parameters. Raises InputError if it does not fit.
        """
        with torch.no_grad():
            for name in self._names():
                local = self._weights.local[name]
                split = self._weights.slices.get(name)
                saved = checkpoint.weight(aliases.get(name, [name]), None if split else local)
                self._check(name, saved, split)
                local.copy_(self._cut(saved, split))
        names = {one: name for name, one in self._weights.parameters.items()}
        checkpoint.restore_settings(names, self._optimizer, self._scheduler)
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                split = self._weights.slices.get(names[parameter])
                found = checkpoint.optimizer_state(names[parameter])
                self._optimizer.state[parameter] = {
                    key: self._cut(value, split).clone() for key, value in found.items()
                }

    def _names(self) -> list[str]:
        parameters = self._weights.parameters
        return [name for name in self._weights.local if name in parameters or name in self._kept]

    def _tensors_of(self, name: str) -> dict[str, torch.Tensor]:
        """A parameter or buffer, and what the optimizer keeps for it, by their keys in files."""
        local = self._weights.local[name]
        found = {f"model.{name}": local.data}
        if isinstance(local, nn.Parameter):
            for key, value in sorted(self._optimizer.state.get(local, {}).items()):
                if value is not None:
                    found[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        return found

    def _split(self, name: str, tensor: torch.Tensor) -> WeightUse | None:
        """How a tensor is split, if each worker has, or knows, a part of it only.

        Raises InputError for what an optimizer keeps of a slice in another shape: nobody knows how
        that of the whole would look.
        """
        use = self._weights.slices.get(name) or self._weights.partial.get(name)
        local = self._weights.local[name]
        if use is None or tensor.shape == local.shape:
            return use
        if tensor.numel() > 1 and name in self._weights.slices:
            raise InputError(
                f"the optimizer keeps {[*tensor.shape]} for a part {[*local.shape]} of '{name}', "
                f"which no checkpoint can hold: take another, or a plan without features split"
            )
        return None

    def _gathered(
        self, tensor: torch.Tensor, use: WeightUse | None, writer: int
    ) -> torch.Tensor | None:
        """The whole tensor at its writer; None elsewhere."""
        me = self._channel.worker
        if use is None:
            return tensor if me == writer else None
        owners = [worker for worker in use.layout.workers if use.owner(worker) == worker]
        is_slice = use.name in self._weights.slices
        own = tensor if is_slice else cut_intervals(tensor, use.part(me))
        sends = {writer: own.reshape(-1)} if me in owners and me != writer else {}
        receives = {}
        if me == writer:
            sizes = {owner: math.prod(_shape(use, owner)) for owner in owners if owner != me}
            receives = {owner: tensor.new_empty(size) for owner, size in sizes.items()}
        self._channel.swap(sends, receives, self._channel.route("GATHER"), "update")
        if me != writer:
            return None
        whole = tensor.new_empty(use.shape)
        for owner in owners:
            piece = own if owner == me else receives[owner].view(_shape(use, owner))
            put_intervals(whole, use.part(owner), piece)
        return whole

    def _cut(self, saved: torch.Tensor, use: WeightUse | None) -> torch.Tensor:
        if use is None or tuple(saved.shape) != use.shape:
            return saved
        return cut_intervals(saved, use.part(self._channel.worker))

    def _check(self, name: str, saved: torch.Tensor, use: WeightUse | None) -> None:
        if use is not None and tuple(saved.shape) != use.shape:
            raise InputError(
                f"'{name}' is {use.shape} in the model and {tuple(saved.shape)} in the checkpoint: "
                f"train another model with another folder of checkpoints"
            )


def _shape(use: WeightUse, worker: int) -> tuple[int, ...]:
    return tuple(sum(each.size for each in intervals) for intervals in use.part(worker))
