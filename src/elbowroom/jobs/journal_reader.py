"""A job's journal as others read it: folder, rows, totals, lines, while a run may write it."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbowroom.core import host
from elbowroom.core.errors import InputError, OutputError
from elbowroom.core.files import real_path

CLOEXEC = getattr(os, "O_CLOEXEC", 0)  # Windows passes no file on unless it is told to


@dataclass(frozen=True, slots=True)
class FinishedRow:
    """A row and its result line. ``failure`` names what went wrong; None is success.

    A line that is not a request has no hashes: it was never work, and is judged again. The others
    are those of ``Row``.
    """

    index: int
    custom_id: str
    content_hash: int | None
    failure: str | None
    line: bytes
    prompt_tokens: int = 0
    output_tokens: int = 0
    meaning_hash: int | None = None


@dataclass(frozen=True)
class JournalTotals:
    """Rows and tokens in a journal. ``failures`` counts failed rows by what went wrong."""

    num_succeeded: int
    failures: dict[str, int]
    prompt_tokens: int
    output_tokens: int

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    @property
    def num_finished(self) -> int:
        return self.num_succeeded + self.num_failed


def journal_folder(output: Path) -> Path:
    """The journal's folder beside ``output``, or ``output`` itself if it is that folder.

    Raises InputError for a path without a file name.
    """
    if not output.name:
        raise InputError(f"'{output}' is no file: name the --output of a run, as it was given")
    if output.suffix == ".elbowroom" and output.is_dir():
        return output
    return output.with_name(f"{output.name}.elbowroom")


class JournalReader:
    """Reader of a journal, also while a run writes it. Use as a context manager."""

    def __init__(self, output: Path) -> None:
        """Open the journal beside ``output``. Raises InputError when there is none."""
        self.folder = journal_folder(output)
        if not database_path(self.folder).exists():
            raise InputError(
                f"{self.folder} is not there: name the --output of a run, as it was given"
            )
        with explained(self.folder):
            self._database = sqlite3.connect(
                f"file:{database_path(self.folder)}?mode=ro", uri=True, timeout=10
            )
            if self._database.execute("PRAGMA user_version").fetchone() == (0,):
                raise InputError(f"{self.folder} has just been made: try again in a moment")

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def totals(self) -> JournalTotals:
        return read_totals(self._database, self.folder)

    def facts(self) -> dict[str, Any]:
        """Facts that the run noted about itself, without the job's identity."""
        with explained(self.folder):
            rows = self._database.execute("SELECT field, value FROM job").fetchall()
        return {name[1:]: json.loads(value) for name, value in rows if name.startswith("_")}

    def lines(self, succeeded: bool | None = None) -> Iterator[bytes]:
        """Result lines of rows finished so far, in input order."""
        with explained(self.folder):
            yield from read_lines(self._database, succeeded)

    def is_running(self) -> bool:
        with explained(self.folder):
            descriptor = os.open(self.folder / "lock", os.O_RDWR | CLOEXEC)
        try:
            return not host.try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)


def place_of(path: Path, output: Path) -> str:
    """A path as seen from the output's folder: a job may be moved with its files."""
    return os.path.relpath(real_path(path), real_path(output.parent))


def written_files(output: Path) -> set[str]:
    """Results that runs of the job with this output have published, by ``place_of``.

    Empty without a job, and for a journal that cannot be read.
    """
    if not database_path(journal_folder(output)).exists():
        return set()
    try:
        with JournalReader(output) as journal:
            return set(journal.facts().get("files", ()))
    except (InputError, OutputError):
        return set()


def read_lines(database: sqlite3.Connection, succeeded: bool | None) -> Iterator[bytes]:
    which = {None: "1", True: "failure IS NULL", False: "failure IS NOT NULL"}[succeeded]
    for (line,) in database.execute(f"SELECT line FROM rows WHERE {which} ORDER BY row_index"):
        yield line


def read_totals(database: sqlite3.Connection, folder: Path) -> JournalTotals:
    with explained(folder):
        groups = database.execute(
            "SELECT failure, COUNT(*), SUM(prompt_tokens), SUM(output_tokens) FROM rows GROUP BY 1"
        ).fetchall()
    return JournalTotals(
        num_succeeded=sum(count for failure, count, *_ in groups if failure is None),
        failures={failure: count for failure, count, *_ in groups if failure is not None},
        prompt_tokens=sum(group[2] for group in groups),
        output_tokens=sum(group[3] for group in groups),
    )


def database_path(folder: Path) -> Path:
    return folder / "journal.sqlite"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error.strerror}. Free some space or choose another folder "
            f"for --output; finished rows are kept"
        ) from error
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            remedy = "it is damaged: restore it from a copy, or use --restart to start over"
        else:
            remedy = "free some space or check permissions, then run again; finished rows are kept"
        raise OutputError(f"cannot use the journal {folder}: {error}; {remedy}") from error
