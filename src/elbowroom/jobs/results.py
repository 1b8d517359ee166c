"""Result lines, and the files in which they are published: whole, in input order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

from elbowroom.core.errors import OutputError
from elbowroom.core.files import (
    check_apart,
    check_names,
    check_writable,
    explained_writes,
    publish_file,
    real_path,
    staged_file,
)
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import place_of, written_files
from elbowroom.jobs.parquet import is_named_parquet, load_arrow
from elbowroom.jobs.parquet_results import table_parts
from elbowroom.jobs.verify import verify_results

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"}
"""Characters at which many readers of lines break: in a result they are JSON escapes."""


def response_line(custom_id: str, status_code: int, body: Any) -> bytes:
    """Result line of a row that the engine answered, well or with an HTTP error."""
    response = {"status_code": status_code, "request_id": request_id(custom_id), "body": body}
    return _line(custom_id, response, None)


def request_id(custom_id: str) -> str:
    """Request id of a row, the same in every run; vLLM makes the id of its response from it."""
    return _derive("req", custom_id)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """Result line of a row that no engine answered."""
    return _line(custom_id, None, {"code": code, "message": message})


def publish(journal: Journal, batch: BatchFile, output: Path, errors: Path) -> None:
    """Write both files whole, in input order. Without failed rows there is no error file.

    A file named ``.parquet`` is a table, any other has JSON lines.

    Before they take their names, both are read again: each row of ``batch`` must be in them exactly
    once. Raises OutputError when one is not, or when the disk refuses; then nothing is published,
    and no half file is left.
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
            publish_file(failed, errors)
        else:
            with explained_writes(str(errors)):
                real_path(errors).unlink(missing_ok=True)
        publish_file(answered, output)  # last: who sees the output may trust the errors beside it


def _staged(path: Path, lines: Iterator[bytes]) -> AbstractContextManager[Path]:
    """A temporary file of result lines in the form that ``path`` asks for."""
    return staged_file(path, table_parts(path, lines) if is_named_parquet(path) else lines)


def check_paths(
    inputs: Sequence[Path], output: Path, errors: Path, report: Path, *, overwrite: bool = False
) -> None:
    """Raise OutputError, before anything is loaded, if results could not be written.

    Files that are there and are not of this job's earlier runs are written over only with
    ``overwrite``. Missing folders are created. Raises InputError for tables without pyarrow.
    """
    for path in filter(is_named_parquet, (output, errors)):
        load_arrow(path)
    written = [("--output", output), ("--errors", errors), ("--report", report)]
    check_names(path for _, path in written)
    check_apart([*(("input", path) for path in inputs), *written])
    check_writable((output, errors, report))
    own = written_files(output)
    for _, path in written:
        if path.exists() and not overwrite and place_of(path, output) not in own:
            raise OutputError(
                f"{path} is there, and no run of this job wrote it: name another file, remove it, "
                f"or give --overwrite"
            )


def _line(custom_id: str, response: Any, error: Any) -> bytes:
    line = {
        "id": _derive("batch_req", custom_id),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    # Half a surrogate pair has no bytes in UTF-8: it becomes the \u escape that JSON allows.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _derive(prefix: str, custom_id: str) -> str:
    """An id that is the same in every run."""
    return f"{prefix}_{blake2b(custom_id.encode(), digest_size=12).hexdigest()}"
