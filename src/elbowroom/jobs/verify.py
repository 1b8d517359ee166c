"""Check that results are complete: every id of the input exactly once, in output or errors."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elbowroom.core.errors import InputError
from elbowroom.jobs.batch_file import BatchFile, hash_id
from elbowroom.jobs.parquet import MAGIC
from elbowroom.jobs.parquet_results import table_ids

_MAX_NAMED = 10


@dataclass(frozen=True)
class Verification:
    """Rows that are missing, repeated or unknown in the results; some ids of each are named."""

    num_rows: int
    num_missing: int
    num_repeated: int
    num_unknown: int
    missing: tuple[str, ...]
    repeated: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return not (self.num_missing or self.num_repeated or self.num_unknown)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_good": self.is_good}

    def __str__(self) -> str:
        if self.is_good:
            return f"each of {self.num_rows} rows has exactly one result"
        kinds = (
            (self.num_missing, "missing", self.missing),
            (self.num_repeated, "more than once", self.repeated),
            (self.num_unknown, "not in the input", self.unknown),
        )
        found = [f"{count} {kind} ({', '.join(names)})" for count, kind, names in kinds if count]
        return f"of {self.num_rows} rows: {'; '.join(found)}"


def verify_results(batch: BatchFile, paths: Sequence[Path]) -> Verification:
    """Compare the ids of a scanned batch with those in result files. 32 bytes per row.

    Raises InputError when a file cannot be read, or has a line that is no result.
    """
    expected = batch.id_hashes()
    hashes = array("Q", (hash_id(custom_id) for path in paths for custom_id in result_ids(path)))
    found, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
    missing = np.flatnonzero(~np.isin(expected, found))
    repeated = set(found[counts > 1].tolist())
    unknown = set(found[~np.isin(found, expected)].tolist())
    return Verification(
        num_rows=batch.num_rows,
        num_missing=len(missing),
        num_repeated=len(repeated),
        num_unknown=len(unknown),
        missing=tuple(batch.read(int(index)).custom_id for index in missing[:_MAX_NAMED]),
        repeated=_named(paths, repeated),
        unknown=_named(paths, unknown),
    )


def result_ids(path: Path) -> Iterator[str]:
    """The ``custom_id`` of every line, or row of a Parquet file, of results. Raises InputError."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                yield from table_ids(path)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                yield _result_id(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check its name") from error


def _result_id(line: bytes, place: str) -> str:
    """The ``custom_id`` of a result line, which has a response or an error. Raises InputError."""
    try:
        result = json.loads(line)
        custom_id, kinds = result["custom_id"], (result.get("response"), result.get("error"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{place} is no result: {error!r}") from error
    if not isinstance(custom_id, str):
        raise InputError(f"{place} has no custom_id: it is no result")
    if not any(isinstance(kind, dict) for kind in kinds):
        raise InputError(f"{place} has neither a response nor an error: it is no result")
    return custom_id


def _named(paths: Sequence[Path], hashes: set[int]) -> tuple[str, ...]:
    """Some ids with these hashes, looked up in the files again."""
    names: dict[str, None] = {}
    if hashes:
        for path in paths:
            for custom_id in result_ids(path):
                if hash_id(custom_id) in hashes:
                    names[custom_id] = None
                    if len(names) == _MAX_NAMED:
                        return tuple(names)
    return tuple(names)
