"""Result lines, and the files in which they are published: whole, in input order."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from elbowroom.core.errors import OutputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.verify import verify_results


def response_line(custom_id: str, status_code: int, body: Any) -> bytes:
    """A line for a row that the engine answered, well or with an HTTP error."""
    response = {"status_code": status_code, "request_id": request_id(custom_id), "body": body}
    return _line(custom_id, response, None)


def request_id(custom_id: str) -> str:
    """The same in every run; vLLM makes the id of its response from it."""
    return _derive("req", custom_id)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """A line for a row that no engine answered."""
    return _line(custom_id, None, {"code": code, "message": message})


def publish(journal: Journal, batch: BatchFile, output: Path, errors: Path) -> None:
    """Write both files whole, in input order. Without failed rows there is no error file.

    Before they take their names, both are read again: each row of ``batch`` must stand in them
    exactly once. Raises OutputError when one does not, or when the disk refuses; then nothing is
    published, and no half file is left.
    """
    with ExitStack() as stack:
        answered = stack.enter_context(_staged(output, journal.lines(succeeded=True)))
        staged = [answered]
        if journal.totals.num_failed:
            failed = stack.enter_context(_staged(errors, journal.lines(succeeded=False)))
            staged.append(failed)
        verification = verify_results(batch, staged)
        if not verification.is_good:
            raise OutputError(f"{verification}: nothing was published; please report this")
        if len(staged) > 1:
            _rename(failed, errors)
        else:
            with _explained(str(errors)):
                errors.unlink(missing_ok=True)
        _rename(answered, output)  # last: who sees the output may trust the errors beside it


def write_atomically(path: Path, parts: Iterator[bytes]) -> None:
    """Replace ``path`` by ``parts`` in one step, mode 0600. Raises OutputError; leaves no rest."""
    with _staged(path, parts) as temporary:
        _rename(temporary, path)


@contextmanager
def _staged(path: Path, parts: Iterator[bytes]) -> Iterator[Path]:
    """A whole file beside ``path``, safe on disk. It is removed unless renamed in time."""
    with _explained(str(path)):
        _refuse_what_is_no_file(path)
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


def check_paths(inputs: Sequence[Path], output: Path, errors: Path, report: Path) -> None:
    """Raise OutputError, before anything is loaded, if results could not be written.

    Folders that are missing are made.
    """
    written = [("--output", output), ("--errors", errors), ("--report", report)]
    named = [*(("input", path) for path in inputs), *written]
    for at, (name, path) in enumerate(named):
        for other_name, other in named[at + 1 :]:
            if _is_same(path, other):
                raise OutputError(
                    f"{name} and {other_name} are the same file ({path}): give each its own"
                )
    check_writable((output, errors, report))


def check_writable(paths: Iterable[Path]) -> None:
    """Raise OutputError if files could not be written there. Folders that are missing are made."""
    for path in paths:
        with _explained(str(path)):
            _refuse_what_is_no_file(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{path.parent} is not writable: choose another folder")
        # Root may write anywhere, but not on a read-only disk.
        with _explained(str(path)), tempfile.TemporaryFile(dir=path.parent):
            pass


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise OutputError for pipes, folders and devices: a rename would replace even /dev/null."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file: name a file to write")


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
