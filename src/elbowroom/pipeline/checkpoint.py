"""Checkpoints of pipelines: whole or not at all, and for any number of stages.

A folder ``step-00000200`` holds a safetensors file for each stage, weights, buffers and optimizer
state by the names that the model has for its parameters, and an index of them. It is written under
another name, which it loses when all stages have written theirs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn

from elbowroom.core.errors import InputError, OutputError

_INDEX, _VERSION = "index.json", 1
_KEPT = 2


@dataclass(frozen=True)
class Index:
    """The index of a checkpoint: its place in the run, and in which of its files each tensor is.

    ``steps`` minibatches were trained, and the next is number ``next_minibatch``. ``settings`` are
    those of the optimizer and its scheduler, which are the same in all stages.
    """

    steps: int
    next_minibatch: int
    settings: dict[str, Any]
    files: dict[str, str]


class Checkpoint:
    """A whole checkpoint on disk. Raises InputError for an index that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            data = json.loads((path / _INDEX).read_text())
            if data.pop("version") != _VERSION:
                raise InputError(f"{path} is of another version of checkpoints")
            self.index = Index(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read the checkpoint {path}: {error}") from error

    def load_weights(self, module: nn.Module) -> None:
        """Put weights and buffers into the module of a stage, or into the whole model.

        Raises InputError if the checkpoint is of another model, or damaged.
        """
        for name, tensor in _weights(module).items():
            tensor.copy_(self._read(f"model.{name}", tensor))

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights, buffers and optimizer state into a stage and its optimizer.

        Raises InputError if the checkpoint is of another model or optimizer, or damaged.
        """
        self.load_weights(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        settings = self.index.settings["optimizer"]
        for group, saved in zip(optimizer.param_groups, settings, strict=True):
            group.update(saved)
            for parameter in filter(names.__contains__, group["params"]):
                prefix = f"optimizer.{names[parameter]}."
                keys = [key for key in self.index.files if key.startswith(prefix)]
                optimizer.state[parameter] = {
                    key.removeprefix(prefix): self._read(key) for key in keys
                }

    def _read(self, name: str, like: torch.Tensor | None = None) -> torch.Tensor:
        try:
            with safe_open(self._path / self.index.files[name], "pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (KeyError, OSError, SafetensorError) as error:
            raise InputError(
                f"{self._path} has no tensor '{name}' that can be read: it is of another model, or "
                f"damaged ({error}): remove it to resume from the one before"
            ) from error
        if like is not None and (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise InputError(
                f"'{name}' is {tuple(like.shape)} in the model and {tuple(tensor.shape)} in "
                f"{self._path}: train another model with another folder of checkpoints"
            )
        return tensor


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, if it has one."""
    found = _whole(folder)
    return Checkpoint(found[-1]) if found else None


def save(
    folder: Path,
    module: nn.Module,
    stage: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    steps: int,
    next_minibatch: int,
    is_writer: bool,
) -> Path:
    """Write a checkpoint of all stages; every worker must call it, one ``is_writer`` a stage.

    All but the last two checkpoints are removed. Raises OutputError, and InputError for a folder of
    another run, which has come further.
    """
    path = folder / f"step-{steps:08d}"
    if any(other.name > path.name for other in _whole(folder)):
        raise InputError(
            f"{folder} has checkpoints beyond step {steps}, of another run: give each run a folder "
            f"of its own, or restore to resume from there"
        )
    part = path.with_suffix(".part")
    is_first = distributed.get_rank() == 0
    try:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)  # of a run that died
            part.mkdir(parents=True)
        distributed.barrier()
        if is_writer:
            _write_stage(part / f"stage-{stage}.safetensors", module, optimizer)
        distributed.barrier()
        if is_first:
            index = Index(steps, next_minibatch, _settings(optimizer, scheduler), _files_in(part))
            _write_synced(part / _INDEX, json.dumps({"version": _VERSION, **asdict(index)}))
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
            for old in _whole(folder)[:-_KEPT]:
                shutil.rmtree(old)
        distributed.barrier()
    except OSError as error:
        raise OutputError(f"cannot write the checkpoint {path}: {error}") from error
    return path


def _whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, from the oldest to the newest."""
    names = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [p for p in names if re.fullmatch(r"step-\d{8}", p.name) and (p / _INDEX).exists()]


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once, and buffers that a state dict has."""
    kept = module.state_dict(keep_vars=False)
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**{name: one.data for name, one in module.named_parameters()}, **buffers}


def _write_stage(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in _weights(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _settings(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None
) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return {"optimizer": groups, "scheduler": scheduler.state_dict() if scheduler else None}


def _files_in(part: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in sorted(part.glob("stage-*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path.name)
    return files


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
