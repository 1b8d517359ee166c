"""The journal of a job: finished rows, kept beside the output until somebody removes them.

It is an SQLite database in write-ahead mode, in ``RESULTS.elbowroom/``. What was committed survives
the death of any process and of the machine; SQLite ignores a torn end. One process at a time writes
it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from elbowroom.core import host
from elbowroom.core.errors import InputError, OutputError, shown
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal_reader import (
    CLOEXEC,
    FinishedRow,
    JournalTotals,
    database_path,
    explained,
    journal_folder,
    read_lines,
    read_totals,
)

COMMIT_SECONDS = 0.5
"""Longest time until a finished row is safe on disk."""

RETRIED_FAILURES = ("http_400", "http_404", "http_501", "limit_exceeded", "row_timeout")
"""Failures that may lie in a run's settings: names of the model, limits, the longest row."""

_MAX_PENDING = 2000
_SCHEMA = """
    CREATE TABLE job (field TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE rows (
        row_index INTEGER PRIMARY KEY,
        custom_id TEXT NOT NULL,
        content_hash INTEGER, -- none for a line that is no request
        failure TEXT,
        line BLOB NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        meaning_hash INTEGER
    );
"""
_VERSION = 2


OnCommit = Callable[[Sequence[FinishedRow]], None]
"""Callback with rows that have become safe on disk."""


class Journal:
    """The one writer of a job's journal. Use as a context manager."""

    def __init__(
        self, output: Path, restart: bool = False, on_commit: OnCommit | None = None
    ) -> None:
        """Open the journal beside ``output``, or begin one; ``restart`` drops its contents.

        Raises OutputError when another run has it, or when it cannot be written or read.
        """
        self._folder = journal_folder(output)
        self._on_commit = on_commit
        self._pending: list[FinishedRow] = []
        self.num_retried = 0
        self._committed_at = time.monotonic()
        with explained(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(self._folder, output)
        try:
            with explained(self._folder):
                if restart:
                    _remove(self._folder)
                self._database = _connect(self._folder)
            self._finished: Counter[str | None] = Counter()
            self._num_tokens = [0, 0]
            self._load_totals()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(OutputError):  # it was told of when it came first
                self.commit()
            self._database.close()
        finally:
            os.close(self._lock)

    def admit(
        self,
        identity: Mapping[str, str],
        batch: BatchFile,
        settings: Mapping[str, object] | None = None,
        *,
        retry_failed: bool = False,
    ) -> np.ndarray[Any, Any]:
        """Begin or resume a job. Returns a mask of the rows that need no more work.

        The mask is bool [num_rows]. Finished rows are found again by the contents of their line,
        wherever it now is in the file. Rows that failed are tried again with ``retry_failed``; if
        ``settings`` differ from those of the last run, so are those whose failure may lie in them.
        Raises InputError when the journal is of another job that has answers, with the field that
        differs, or when the line of an answered row is gone, changed or longer than it may be. A
        row that failed is forgotten then, and its line tried as it is now.
        """
        facts = self.facts()
        known = {f: v for f, v in facts.items() if not f.startswith("_")}
        is_other = bool(known) and known != dict(identity)
        for field in [*known, *identity] if is_other and self.totals.num_succeeded else []:
            if known.get(field) != identity.get(field):
                raise InputError(
                    f"{self._folder} belongs to another job: {field} was "
                    f"{known.get(field, 'not there')}, now it is {identity.get(field, 'not there')}"
                    f". Use the same {field} to resume, or --restart to start over"
                )
        with explained(self._folder), self._database:
            self._database.execute("DELETE FROM rows WHERE content_hash IS NULL")
            if is_other:
                self._database.execute("DELETE FROM job")
            given = json.dumps(settings or {}, sort_keys=True)
            if retry_failed or is_other:
                self.num_retried = self._drop("failure IS NOT NULL")
            elif facts.get("_settings", given) != given:
                self.num_retried = self._drop(f"failure IN {RETRIED_FAILURES}")
            self._set_facts({**identity, "_num_rows": str(batch.num_rows), "_settings": given})
            indices = self._find_again(batch)
        self._load_totals()
        is_finished = np.zeros(batch.num_rows, bool)
        is_finished[indices] = True
        return is_finished

    def put(self, row: FinishedRow) -> None:
        """Take a finished row. It is safe once ``commit`` or a later ``tick`` has returned."""
        self._pending.append(row)
        if len(self._pending) >= _MAX_PENDING:
            self.commit()

    def tick(self) -> None:
        """Commit if the oldest row may have waited long enough."""
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make every row that was put safe. Raises OutputError; then the rows stay pending."""
        rows = self._pending
        self._committed_at = time.monotonic()
        if not rows:
            return
        with explained(self._folder), self._database:
            self._database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                map(_columns, rows),
            )
        self._pending = []
        for row in rows:
            self._finished[row.failure] += 1
            self._num_tokens[0] += row.prompt_tokens
            self._num_tokens[1] += row.output_tokens
        if self._on_commit is not None:
            self._on_commit(rows)

    def note(self, **facts: object) -> None:
        """Keep facts about this run for ``status``."""
        with explained(self._folder), self._database:
            self._set_facts({f"_{name}": json.dumps(value) for name, value in facts.items()})

    def facts(self) -> dict[str, str]:
        with explained(self._folder):
            return dict(self._database.execute("SELECT field, value FROM job"))

    @property
    def totals(self) -> JournalTotals:
        """Totals over rows that are safe."""
        failures = {name: count for name, count in self._finished.items() if name is not None}
        return JournalTotals(self._finished[None], failures, *self._num_tokens)

    def lines(self, succeeded: bool) -> Iterator[bytes]:
        """Result lines in input order, of rows that succeeded or of those that failed."""
        with explained(self._folder):
            yield from read_lines(self._database, succeeded)

    def _find_again(self, batch: BatchFile) -> np.ndarray[Any, Any]:
        """Move finished rows to the indices of their lines now. Returns these indices.

        Lines are found by their bytes, or else by what they say. A row that failed is forgotten if
        its line is gone, changed or over the cap. Raises InputError if that of an answered one is.
        """
        query = (
            "SELECT row_index, content_hash, IFNULL(meaning_hash, 0), failure IS NOT NULL "
            "FROM rows ORDER BY 1"
        )
        rows = np.array(self._database.execute(query).fetchall(), np.int64).reshape(-1, 4)
        if not len(rows):
            return rows[:, 0]
        hashes = np.ascontiguousarray(rows[:, 1:3]).view(np.uint64)
        indices = batch.find(hashes[:, 0])
        if (is_lost := indices < 0).any():
            indices[is_lost] = batch.find_meanings(hashes[is_lost, 1])
            self._rehash(batch, rows[is_lost, 0], indices[is_lost])
        is_gone = indices < 0
        self._check_failed(
            rows[is_gone],
            f"is gone or changed in {batch.name}. Give the same lines (more may follow)",
        )
        is_long = ~is_gone & ~batch.has_id(indices)
        self._check_failed(rows[is_long], "is longer than --max-line-bytes. Raise that")
        is_gone |= is_long
        self._database.executemany(
            "DELETE FROM rows WHERE row_index = ?", rows[is_gone, :1].tolist()
        )
        self._move(rows[~is_gone, 0], indices[~is_gone])
        return indices[~is_gone]

    def _rehash(
        self, batch: BatchFile, before: np.ndarray[Any, Any], indices: np.ndarray[Any, Any]
    ) -> None:
        """Keep the bytes that lines have now, of rows that were found by what they say."""
        self._database.executemany(
            "UPDATE rows SET content_hash = ? WHERE row_index = ?",
            [
                (_signed(batch.content_hash(index)), old)
                for index, old in zip(indices.tolist(), before.tolist(), strict=True)
                if index >= 0
            ],
        )

    def _check_failed(self, rows: np.ndarray[Any, Any], problem: str) -> None:
        """Raise InputError if one of some rows, which cannot be kept, was answered."""
        answered = rows[rows[:, 3] == 0, 0]
        if len(answered):
            query = "SELECT custom_id FROM rows WHERE row_index = ?"
            (custom_id,) = self._database.execute(query, (int(answered[0]),)).fetchone()
            raise InputError(
                f"{self._folder} cannot be resumed: the line of {shown(custom_id)}, which was "
                f"answered, {problem} to resume, or --restart to start over"
            )

    def _move(self, before: np.ndarray[Any, Any], indices: np.ndarray[Any, Any]) -> None:
        """Give rows other indices."""
        if (indices != before).any():
            moves = list(zip(indices.tolist(), before.tolist(), strict=True))
            update = "UPDATE rows SET row_index = ? WHERE row_index = ?"
            # Move them out of the way first: two rows may change places.
            self._database.executemany(update, [(-1 - old, old) for _, old in moves])
            self._database.executemany(update, [(new, -1 - old) for new, old in moves])

    def _drop(self, which: str) -> int:
        """Forget rows. Returns how many."""
        return self._database.execute(f"DELETE FROM rows WHERE {which}").rowcount

    def _set_facts(self, facts: Mapping[str, str]) -> None:
        self._database.executemany("REPLACE INTO job VALUES (?, ?)", facts.items())

    def _load_totals(self) -> None:
        totals = read_totals(self._database, self._folder)
        self._finished = Counter(totals.failures)
        self._finished[None] = totals.num_succeeded
        self._num_tokens = [totals.prompt_tokens, totals.output_tokens]


def _connect(folder: Path) -> sqlite3.Connection:
    """Open the database, creating it with mode 0600: SQLite gives its other files the same mode.

    Raises OutputError for the journal of another version.
    """
    path = database_path(folder)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | CLOEXEC, 0o600))
    database = sqlite3.connect(path, timeout=10)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with database:
                database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {_VERSION};COMMIT;")
        elif version != _VERSION:
            raise OutputError(
                f"{folder} was written by another version of elbowroom: finish it with that one, "
                f"or use --restart to start over"
            )
    except BaseException:
        database.close()
        raise
    return database


def _remove(folder: Path) -> None:
    for name in ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)


def _lock(folder: Path, output: Path) -> int:
    """Hold ``folder``'s lock until this process dies, however that happens: the kernel frees it.

    Raises OutputError if another run holds it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | CLOEXEC, 0o600)
    if not host.try_lock(descriptor):
        os.close(descriptor)
        raise OutputError(
            f"another run is writing {output}: wait for it, or watch it with "
            f"'elbowroom status {output}'"
        )
    return descriptor


def _columns(row: FinishedRow) -> tuple[object, ...]:
    tokens = (row.prompt_tokens, row.output_tokens)
    hashes = (_signed(row.content_hash), _signed(row.meaning_hash))
    return (row.index, row.custom_id, hashes[0], row.failure, row.line, *tokens, hashes[1])


def _signed(number: int | None) -> int | None:
    """A hash as SQLite's integers have it, with a sign."""
    return number - 2**64 if number is not None and number >= 2**63 else number
