"""Result lines: they arrive in any order, wait on disk, and are published whole in input order."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from elbowroom.core.errors import OutputError

_MISSING = -1


def response_line(custom_id: str, status_code: int, body: Any) -> bytes:
    """A line for a row that the engine answered, well or with an HTTP error."""
    response = {"status_code": status_code, "request_id": _derive("req", custom_id), "body": body}
    return _line(custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """A line for a row that never reached an engine."""
    return _line(custom_id, None, {"code": code, "message": message})


class Spool:
    """Holds finished lines in an unnamed file beside the output, so that memory does not grow.

    A full disk shows while rows are answered, not at the end. Keeps 8 bytes of memory per row.
    Use as a context manager; nothing is left of it afterwards.
    """

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder = folder
        self._offsets = array("q", [_MISSING]) * num_rows
        self._is_success = bytearray(num_rows)
        self._end = 0
        self.num_succeeded = 0
        self.num_failed = 0

    def __enter__(self) -> Spool:
        with _explained(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, index: int, line: bytes, is_success: bool) -> None:
        """Keep the line of row ``index``. A row is answered once: a second line is an error."""
        if self._offsets[index] != _MISSING:
            raise OutputError(f"row {index} was answered twice: please report this")
        with _explained(self._folder):
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        self._offsets[index] = self._end
        self._end += len(line)
        self._is_success[index] = is_success
        self.num_succeeded += is_success
        self.num_failed += not is_success

    def publish(self, output: Path, errors: Path) -> None:
        """Write both files whole, in input order. Without failed rows there is no error file.

        Raises OutputError when a row has no line, or when the disk refuses; no half file is left.
        """
        num_missing = len(self._offsets) - self.num_succeeded - self.num_failed
        if num_missing:
            raise OutputError(f"{num_missing} of {len(self._offsets)} rows have no result")
        write_atomically(output, self._lines(succeeded=True))
        if self.num_failed:
            write_atomically(errors, self._lines(succeeded=False))
        else:
            errors.unlink(missing_ok=True)

    def _lines(self, succeeded: bool) -> Iterator[bytes]:
        for index, offset in enumerate(self._offsets):
            if bool(self._is_success[index]) == succeeded:
                self._file.seek(offset)
                yield self._file.readline()


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Replace ``path`` by ``parts`` in one step, mode 0600. Raises OutputError; leaves no rest."""
    with _explained(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def check_paths(input_path: Path, output: Path, errors: Path, report: Path) -> None:
    """Raise OutputError, before anything is loaded, if results could not be written."""
    paths = {"input": input_path, "--output": output, "--errors": errors, "--report": report}
    names = list(paths)
    for at, name in enumerate(names):
        for other in names[at + 1 :]:
            if _is_same(paths[name], paths[other]):
                raise OutputError(f"{name} and {other} are the same file ({paths[name]})")
    for path in (output, errors, report):
        if path.is_dir():
            raise OutputError(f"{path} is a directory: name a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path.parent} is not writable: choose another --output")


def _is_same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}. Nothing was published; free some space or "
            f"choose another --output, then run again"
        ) from error


def _line(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": _derive("batch_req", custom_id),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


def _derive(prefix: str, custom_id: str) -> str:
    """An id that is the same in every run."""
    return f"{prefix}_{blake2b(custom_id.encode(), digest_size=12).hexdigest()}"
