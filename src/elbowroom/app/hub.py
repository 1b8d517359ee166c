"""Models by their name on the Hugging Face hub: from its cache, or downloaded by its library."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from elbowroom.core.errors import InputError, first_line
from elbowroom.core.model import repository_of
from elbowroom.core.model_shapes import weight_files

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FACTS = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)
_OTHER_FORMATS = ("original/*", "onnx/*")


def find_model(name: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The folder of a model that is given as a folder, or by its name on the hub.

    What is in the hub's cache is taken from there; the rest is downloaded, unless HF_HUB_OFFLINE is
    set. ``revision`` pins a branch, tag or commit. Raises InputError when there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"--revision is for models of the hub, and {name} is a folder")
        return folder
    if folder.exists() or not _NAME.fullmatch(name):
        raise InputError(
            f"{name} is not a directory: give --model a Hugging Face folder, or a name on the hub "
            f"such as Qwen/Qwen3-0.6B"
        )
    # Takes a second to import. It comes with tokenizers.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*_FACTS, *(_WEIGHTS if with_weights else ())]
    get = partial(
        snapshot_download,
        name,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=[*_OTHER_FORMATS],
    )
    try:
        cached = Path(get(local_files_only=True))
        if not with_weights or _has_weights(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:  # no name that the hub would give
        raise InputError(f"{name} is no folder, and no name on the hub: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{name} is no folder, and not in the hub's cache ({constants.HF_HUB_CACHE}): unset "
            f"HF_HUB_OFFLINE to download it, or give a folder"
        )
    try:
        return Path(get())
    except Exception as error:  # of the network, the hub, or the disk
        reason = first_line(error)
        message = f"{name} is no folder, and cannot be had from the hub: {reason}"
        raise InputError(message) from error


def complete(folder: Path) -> Path:
    """A folder that a plan names. One in the hub's cache gets the weights that it lacks."""
    name = repository_of(folder)
    if name is None or _has_weights(folder):
        return folder
    return find_model(name, folder.name)


def _has_weights(folder: Path) -> bool:
    files = weight_files(folder)
    return bool(files) and all(file.exists() for file in files)
