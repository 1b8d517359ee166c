"""Result lines: they arrive in any order, wait on disk, and are published whole in input order."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
        with _explained(f"a temporary file in {self._folder}"):
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # bytes that did not fit are tried again, and no longer wanted
            self._file.close()

    def put(self, index: int, line: bytes, is_success: bool) -> None:
        """Keep the line of row ``index``; its only line end is at its end.

        Raises OutputError when the row has a line already, or when the disk refuses.
        """
        if self._offsets[index] != _MISSING:
            raise OutputError(f"row {index} was answered twice: please report this")
        num_bytes = self._end + len(line)
        with _explained(f"{num_bytes} bytes to a temporary file in {self._folder}"):
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        self._offsets[index] = self._end
        self._end = num_bytes
        self._is_success[index] = is_success
        self.num_succeeded += is_success
        self.num_failed += not is_success

    def publish(self, output: Path, errors: Path) -> None:
        """Write both files whole, in input order. Without failed rows there is no error file.

        Raises OutputError when a row has no line, or when the disk refuses; no half file is left.
        """
        num_missing = len(self._offsets) - self.num_succeeded - self.num_failed
        if num_missing:
            raise OutputError(
                f"{num_missing} of {len(self._offsets)} rows have no result: please report this"
            )
        with ExitStack() as stack:
            answered = stack.enter_context(_staged(output, self._lines(succeeded=True)))
            if self.num_failed:
                failed = stack.enter_context(_staged(errors, self._lines(succeeded=False)))
                _rename(failed, errors)
            else:
                with _explained(str(errors)):
                    errors.unlink(missing_ok=True)
            _rename(answered, output)  # last: who sees the output may trust the errors beside it

    def _lines(self, succeeded: bool) -> Iterator[bytes]:
        for index, offset in enumerate(self._offsets):
            if bool(self._is_success[index]) == succeeded:
                self._file.seek(offset)
                yield self._file.readline()


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Replace ``path`` by ``parts`` in one step, mode 0600. Raises OutputError; leaves no rest."""
    with _staged(path, parts) as temporary:
        _rename(temporary, path)


@contextmanager
def _staged(path: Path, parts: Iterator[bytes]) -> Iterator[Path]:
    """A whole file beside ``path``, safe on disk. It is removed unless renamed in time."""
    with _explained(str(path)):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with _explained(str(path)), os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    with _explained(str(path)):
        temporary.replace(path)
    with suppress(OSError):  # the file is whole and in place; not every system can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_paths(input_path: Path, output: Path, errors: Path, report: Path) -> None:
    """Raise OutputError, before anything is loaded, if results could not be written.

    Folders that are missing are made.
    """
    paths = {"input": input_path, "--output": output, "--errors": errors, "--report": report}
    names = list(paths)
    for at, name in enumerate(names):
        for other in names[at + 1 :]:
            if _is_same(paths[name], paths[other]):
                raise OutputError(
                    f"{name} and {other} are the same file ({paths[name]}): give each its own"
                )
    for path in (output, errors, report):
        with _explained(str(path)):
            if path.exists() and not path.is_file():  # a rename would replace even /dev/null
                raise OutputError(f"{path} is not a regular file: name a file to write")
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path.parent} is not writable: choose another folder")


def _is_same(one: Path, other: Path) -> bool:
    """Also through links; for files that are not there yet, through linked folders."""
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {what}: {error.strerror}. Free some space or choose another folder, "
            f"then run again"
        ) from error


def _line(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": _derive("batch_req", custom_id),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    # What UTF-8 has no bytes for, half a surrogate pair, becomes the \u escape that JSON allows.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _derive(prefix: str, custom_id: str) -> str:
    """An id that is the same in every run."""
    return f"{prefix}_{blake2b(custom_id.encode(), digest_size=12).hexdigest()}"
