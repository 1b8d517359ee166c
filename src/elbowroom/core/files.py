"""Whole-file reads and atomic writes: a crash or a full disk never leaves a half-written file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from elbowroom.core.errors import InputError, OutputError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError that says what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def read_as(path: Path, parse: Callable[[Any], T]) -> T:
    """What ``parse`` makes of a JSON file. Its InputError comes with the name of the file."""
    data = read_json(path)
    try:
        return parse(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def is_of_format(path: Path, what: str) -> bool:
    """Whether a JSON file says that it is a ``what`` of ours. Raises as ``read_json`` does."""
    return bool(read_json(path).get("format") == versioned(what, 0)["format"])


def versioned(what: str, version: int) -> dict[str, Any]:
    """The keys by which JSON of ours says what it is, such as "step profile"."""
    return {"format": f"elbowroom {what}", "version": version}


def unversioned(data: Any, what: str, version: int) -> dict[str, Any]:
    """What JSON of ours holds besides. Raises InputError if it is something else."""
    expected = versioned(what, version)
    if not isinstance(data, dict) or data.get("format") != expected["format"]:
        raise InputError(f"no {what}: its \"format\" must be '{expected['format']}'")
    if data.get("version") != version:
        raise InputError(
            f"a {what} of version {data.get('version')!r}: this version reads {version}"
        )
    return {key: value for key, value in data.items() if key not in expected}


def write_text(path: Path, text: str) -> None:
    """Write a whole file as ``write_atomically`` does. Raises OutputError."""
    write_atomically(path, iter([text.encode()]))


def write_json(path: Path, data: Any, *, ascii_only: bool = True) -> None:
    """Write a JSON file, indented, as ``write_text`` does. Raises OutputError."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=ascii_only) + "\n")


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Replace ``path`` by ``parts`` in one step, with the mode that the umask gives.

    A link stays, and what it points at is replaced. Raises OutputError. Leaves no temporary file
    behind.
    """
    with staged_file(path, parts) as temporary:
        publish_file(temporary, path)


@contextmanager
def staged_file(path: Path, parts: Iterator[bytes]) -> Iterator[Path]:
    """Write a temporary file beside ``path``, or what it links to, synced to disk; yield its path.

    The file is removed at the end unless it was renamed. Raises OutputError.
    """
    with explained_writes(str(path)):
        _refuse_what_is_no_file(path)
        real = real_path(path)
        descriptor, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        Path(name).chmod(0o666 & ~_umask())
    temporary = Path(name)
    try:
        with explained_writes(str(path)), os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def publish_file(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path``, or what it links to; sync the folder where the system can.

    Raises OutputError.
    """
    real = real_path(path)
    with explained_writes(str(path)):
        temporary.replace(real)
    with suppress(OSError):  # the file is whole and in place; not every system can sync a folder
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(paths: Iterable[Path]) -> None:
    """Raise OutputError if one of ``paths`` could not be written; create missing folders."""
    paths = tuple(paths)
    check_names(paths)
    for path in paths:
        folder = real_path(path).parent
        with explained_writes(str(path)):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{folder} is not writable: choose another folder")
        # Permissions alone do not tell, for root in particular: create a file and see.
        with explained_writes(str(path)), tempfile.TemporaryFile(dir=folder):
            pass


def check_apart(named: Iterable[tuple[str, Path | None]]) -> None:
    """Raise OutputError if two of these files, each with what it is for, are one. None is none."""
    files = [(name, path) for name, path in named if path is not None]
    for at, (name, path) in enumerate(files):
        for other_name, other in files[at + 1 :]:
            if _is_same(path, other):
                raise OutputError(
                    f"{name} and {other_name} are the same file ({path}): give each its own"
                )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, also through links.

    For files that do not exist yet, through linked folders.
    """
    try:
        return one.samefile(other)
    except OSError:
        return real_path(one) == real_path(other)


def check_names(paths: Iterable[Path]) -> None:
    """Raise OutputError if one of ``paths`` could be no file. Looks, and touches nothing."""
    for path in paths:
        with explained_writes(str(path)):
            _refuse_what_is_no_file(path)


def real_path(path: Path) -> Path:
    """What a path is, or would be, once every link is followed. A link to itself stays."""
    return Path(os.path.realpath(path))


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise OutputError for pipes, folders and devices: a rename would replace even /dev/null.

    Also for what is a file's name only by accident, and for a link that leads nowhere.
    """
    if path.parts[:1] == ("-",) or re.match(r"[a-z][a-z0-9+]+:[/\\]", str(path), re.IGNORECASE):
        raise OutputError(f"{path} is no local file: name one, and print or copy it later")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file: name a file to write")
    real = real_path(path)
    is_loose = any(each.is_symlink() and not each.exists() for each in path.parents)
    if is_loose or real.is_symlink() or (path.is_symlink() and not real.parent.is_dir()):
        raise OutputError(f"{path} is a link to {real}, which cannot be made: name another file")


@contextmanager
def explained_writes(what: str) -> Iterator[None]:
    """Turn an OSError raised inside the block into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {what}: {error.strerror}. Free some space or choose another folder, "
            f"then run again"
        ) from error
