"""Files read and written whole: what a crash or a full disk interrupts leaves nothing half done."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elbowroom.core.errors import InputError, OutputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError, with what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Replace ``path`` by ``parts`` in one step, mode 0600. Raises OutputError; leaves no rest."""
    with staged_file(path, parts) as temporary:
        publish_file(temporary, path)


@contextmanager
def staged_file(path: Path, parts: Iterator[bytes]) -> Iterator[Path]:
    """A whole file beside ``path``, safe on disk. It is removed unless renamed in time."""
    with explained_writes(str(path)):
        _refuse_what_is_no_file(path)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with explained_writes(str(path)), os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def publish_file(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, and sync the folder where the system can."""
    with explained_writes(str(path)):
        temporary.replace(path)
    with suppress(OSError):  # the file is whole and in place; not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(paths: Iterable[Path]) -> None:
    """Raise OutputError if files could not be written there. Folders that are missing are made."""
    for path in paths:
        with explained_writes(str(path)):
            _refuse_what_is_no_file(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path.parent} is not writable: choose another folder")
        # Root may write anywhere, but not on a read-only disk.
        with explained_writes(str(path)), tempfile.TemporaryFile(dir=path.parent):
            pass


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise OutputError for pipes, folders and devices: a rename would replace even /dev/null."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file: name a file to write")


@contextmanager
def explained_writes(what: str) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {what}: {error.strerror}. Free some space or choose another folder, "
            f"then run again"
        ) from error
