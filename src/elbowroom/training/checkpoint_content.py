"""What a checkpoint holds of a module, its optimizer and its scheduler, by the model's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from elbowroom.training.json_state import to_json

MADE = "made_with"
"""Key of a parameter group: its settings as the script made them, before any schedule."""


class StageSettings(NamedTuple):
    """Settings of one stage: of its optimizer's parameter groups, and of its scheduler.

    ``names`` are for each group the names that its parameters have in the model.
    """

    names: list[list[str]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None


class StageContent(NamedTuple):
    """What one writer puts into a checkpoint: tensors by name, and settings if it has any."""

    tensors: dict[str, torch.Tensor]
    settings: StageSettings | None


def content_of(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> StageContent:
    """The content of a stage whose weights are a module's, whole."""
    tensors = {f"model.{name}": tensor for name, tensor in weights_of(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return StageContent(tensors, settings_of(names_of(module), optimizer, scheduler))


def settings_of(
    names: Mapping[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> StageSettings:
    """Settings of an optimizer of parameters with these names, and of its scheduler."""
    return StageSettings(
        group_names(names, optimizer),
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        scheduler.state_dict() if scheduler else None,
    )


def note_made(optimizer: torch.optim.Optimizer) -> None:
    """Keep the settings of a new optimizer, so that a resume with others can be refused."""
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        group[MADE] = {"optimizer": type(optimizer).__name__, **settings}


def check_settings(
    names: Mapping[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
) -> None:
    """Raise InputError for settings that no checkpoint can hold, before any training."""
    to_json([*settings_of(names, optimizer, scheduler)])


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once, and buffers that a state dict has."""
    return {**{name: one.data for name, one in module.named_parameters()}, **kept_buffers(module)}


def kept_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict has, and so a checkpoint, by name."""
    kept = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def names_of(module: nn.Module) -> dict[nn.Parameter, str]:
    """The names of parameters, tied ones by their first."""
    return {parameter: name for name, parameter in module.named_parameters()}


def aliases_of(module: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first: tied ones have several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return {names[0]: names for names in found.values()}


def group_names(
    names: Mapping[nn.Parameter, str], optimizer: torch.optim.Optimizer
) -> list[list[str]]:
    """For each parameter group the names of its parameters in the model."""
    return [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
