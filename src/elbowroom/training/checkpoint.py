"""Checkpoints of training: whole or not at all, and for any number of stages.

A folder ``step-00000200`` holds a safetensors file for each stage, weights, buffers and optimizer
state by the names that the model has for its parameters, and an index of them. It is written under
another name, which it loses when all stages have written theirs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn

from elbowroom.core.errors import InputError, OutputError
from elbowroom.training.checkpoint_content import (
    MADE,
    StageContent,
    StageSettings,
    aliases_of,
    group_names,
    names_of,
    weights_of,
)
from elbowroom.training.json_state import from_json, to_json

_INDEX, _VERSION = "index.json", 2
_KEPT = 2
_GROUP_LISTS = {"base_lrs", "_last_lr"}
"""What schedulers keep for each parameter group."""


@dataclass(frozen=True)
class Index:
    """The index of a checkpoint: its place in the run, and in which of its files each tensor is.

    ``steps`` minibatches were trained, and the next is number ``next_minibatch``. ``stages`` have
    the settings of their optimizers and schedulers; ``run`` is what else must stay as it is.
    """

    steps: int
    next_minibatch: int
    stages: list[StageSettings]
    files: dict[str, str]
    run: dict[str, Any]


class Checkpoint:
    """A whole checkpoint on disk. Raises InputError for an index that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            data = json.loads((path / _INDEX).read_text())
            if data.pop("version") != _VERSION:
                raise InputError(f"{path} is of another version of checkpoints")
            stages = [StageSettings(*from_json(stage)) for stage in data.pop("stages")]
            self.index = Index(stages=stages, **data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"cannot read the checkpoint {path}: {error}") from error

    def load_weights(self, module: nn.Module) -> None:
        """Put weights and buffers into the module of a stage, or into the whole model.

        Raises InputError if the checkpoint is of another model, or damaged.
        """
        aliases = aliases_of(module)
        for name, tensor in weights_of(module).items():
            tensor.copy_(self.weight(aliases.get(name, [name]), tensor))

    def weight(self, names: Sequence[str], like: torch.Tensor | None = None) -> torch.Tensor:
        """A weight or buffer that the model knows by any of these names, whole.

        Raises InputError if there is none, or of another shape or type than ``like``.
        """
        kept = [f"model.{name}" for name in names]
        found = next((one for one in kept if one in self.index.files), kept[0])
        return self._read(found, like)

    def optimizer_state(self, name: str) -> dict[str, torch.Tensor]:
        """What the optimizer kept for a parameter, each of its tensors whole, by its key."""
        prefix = f"optimizer.{name}."
        keys = [key for key in self.index.files if key.startswith(prefix)]
        # Cloned to PyTorch's own memory: files are read into what others manage.
        return {key.removeprefix(prefix): self._read(key).clone() for key in keys}

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """Put weights, buffers and the states of optimizer and scheduler into a stage.

        Settings of parameter groups follow the names of their parameters, in whatever stages they
        were saved. Raises InputError if the checkpoint is damaged, of another model or of another
        optimizer, and if ``note_made`` noted other settings than in the run that saved it.
        """
        self.load_weights(module)
        names = names_of(module)
        self.restore_settings(names, optimizer, scheduler)
        for group in optimizer.param_groups:
            for parameter in filter(names.__contains__, group["params"]):
                optimizer.state[parameter] = self.optimizer_state(names[parameter])

    def restore_settings(
        self,
        names: Mapping[nn.Parameter, str],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """Put the settings of parameter groups, and a scheduler's state, back, as ``restore`` does.

        ``names`` are those of the parameters in the model.
        """
        places = [self._place(group) for group in group_names(names, optimizer)]
        for group, place in zip(optimizer.param_groups, places, strict=True):
            if place is not None:
                saved = place[0].groups[place[1]]
                self._check_made(group.get(MADE, {}), saved.get(MADE, {}))
                group.update(saved)
        if scheduler is not None:
            known = next((place for place in places if place is not None), None)
            stage = known[0] if known else self.index.stages[0]
            if stage.scheduler is None:
                raise InputError(f"{self._path} is of a run without a scheduler: leave it out")
            scheduler.load_state_dict(_of_groups(stage.scheduler, places))

    def _place(self, names: list[str]) -> tuple[StageSettings, int] | None:
        """The stage and the group in which these parameters were saved; None without any.

        Raises InputError if they were in groups that differ.
        """
        found: list[tuple[StageSettings, int]] = []
        for name in names:
            for stage in self.index.stages:
                places = [k for k, group in enumerate(stage.names) if name in group]
                found += [(stage, k) for k in places]
        if names and len(found) < len(names):
            raise InputError(
                f"{self._path} has no settings of '{names[0]}': it is of another optimizer"
            )
        if any(stage.groups[k] != found[0][0].groups[found[0][1]] for stage, k in found):
            raise InputError(
                f"'{names[0]}' and other parameters of its group had settings that differ in "
                f"{self._path}: give them the groups that they had"
            )
        return found[0] if found else None

    def _check_made(self, now: dict[str, Any], saved: dict[str, Any]) -> None:
        for key in now.keys() & saved.keys():
            if to_json(now[key]) != to_json(saved[key]):
                raise InputError(
                    f"{self._path} is of a run with {key} {saved[key]}, and this one has "
                    f"{now[key]}: resume with that, or train in another folder"
                )

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


def newest_of_run(folder: Path, seed: int) -> Checkpoint | None:
    """The newest whole checkpoint of a run with this seed, to resume from.

    Raises InputError if it is of a run with another.
    """
    found = newest_checkpoint(folder)
    of = found.index.run.get("seed", seed) if found else seed
    if of != seed:
        raise InputError(
            f"{folder} is of a run with seed {of}: resume with that, or train in another folder"
        )
    return found


def save(
    folder: Path,
    stage: int,
    content: StageContent | None,
    steps: int,
    next_minibatch: int,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of all stages; every worker must call it, one with ``content`` a stage.

    A process that is in no group is the only one. All but the last two checkpoints are removed.
    Raises OutputError, and InputError for a folder of another run, which has come further.
    """
    path = folder / f"step-{steps:08d}"
    if any(other.name > path.name for other in _whole(folder)):
        raise InputError(
            f"{folder} has checkpoints beyond step {steps}, of another run: give each run a folder "
            f"of its own, or restore to resume from there"
        )
    part = path.with_suffix(".part")
    is_alone = not distributed.is_initialized()
    is_first = is_alone or distributed.get_rank() == 0
    try:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)  # of a run that died
            part.mkdir(parents=True)
        if not is_alone:
            distributed.barrier()
        own = None
        if content is not None:
            _write_stage(part / f"stage-{stage}.safetensors", content.tensors)
            own = to_json([*content.settings]) if content.settings else None
        settings: list[Any] = [own]
        if not is_alone:
            settings *= distributed.get_world_size()
            distributed.all_gather_object(settings, own)
        if is_first:
            index = {
                "steps": steps,
                "next_minibatch": next_minibatch,
                "stages": [stage for stage in settings if stage is not None],
                "files": _files_in(part),
                "run": run or {},
            }
            _write_synced(part / _INDEX, json.dumps({"version": _VERSION, **index}))
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
            for old in _whole(folder)[:-_KEPT]:
                shutil.rmtree(old)
        if not is_alone:
            distributed.barrier()
    except OSError as error:
        raise OutputError(f"cannot write the checkpoint {path}: {error}") from error
    return path


def _whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, from the oldest to the newest."""
    names = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [p for p in names if re.fullmatch(r"step-\d{8}", p.name) and (p / _INDEX).exists()]


def _write_stage(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _of_groups(state: Any, places: Sequence[tuple[StageSettings, int] | None]) -> Any:
    """A scheduler's state whose lists for each group are those of these groups."""
    if isinstance(state, list):
        return [_of_groups(item, places) for item in state]
    if not isinstance(state, dict):
        return state
    found = {key: _of_groups(value, places) for key, value in state.items()}
    known = [place for place in places if place is not None]
    for key in _GROUP_LISTS & found.keys():
        if isinstance(found[key], list) and known and len(found[key]) == len(known[0][0].groups):
            setting = "lr" if key == "_last_lr" else "initial_lr"
            found[key] = [stage.groups[k].get(setting, stage.groups[k]["lr"]) for stage, k in known]
    return found


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
