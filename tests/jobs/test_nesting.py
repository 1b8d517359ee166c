"""Lists and objects inside one another: how deep a line may be, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elbowroom.jobs.batch_file import BatchFile, hash_id
from elbowroom.jobs.rows import RejectedRow, Row
from elbowroom.jobs.strict_json import MAX_DEPTH
from tests.jobs.test_batch_file import request


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth > 1 else []


def only_row(folder: Path, line: bytes) -> Row | RejectedRow:
    (folder / "batch.jsonl").write_bytes(line)
    with BatchFile(folder / "batch.jsonl") as batch:
        return batch.scan().read(0)


def test_nesting_is_counted_and_not_brackets(tmp_path: Path) -> None:
    # The line and its body are the first two layers.
    body = {"deepest": nested(MAX_DEPTH - 2), "wide": [[]] * 1000, "text": '\\"[{' * 1000}
    assert isinstance(only_row(tmp_path, request(body=body)), Row)
    row = only_row(tmp_path, request(body={"x": nested(MAX_DEPTH - 1)}))
    assert isinstance(row, RejectedRow)
    assert row.code == "invalid_json"


def test_a_line_that_is_cut_off_has_a_depth_too(tmp_path: Path) -> None:
    row = only_row(tmp_path, b'{"x": "]", "y": ' + b"[" * MAX_DEPTH)
    assert isinstance(row, RejectedRow)
    assert f"more than {MAX_DEPTH} deep" in row.message


def deeper(num_calls: int, call: Callable[[], Any]) -> Any:
    """The result of ``call`` with this many calls below it on the stack."""
    return deeper(num_calls - 1, call) if num_calls else call()


@pytest.mark.parametrize("depth", [130, 600, 850, 900, 950, 999, 1500])
def test_a_deep_line_is_judged_alike_however_deep_its_reader_is(tmp_path: Path, depth: int) -> None:
    """Python's parser would find the id here, and a RecursionError there."""
    path = tmp_path / "batch.jsonl"
    line = b'{"custom_id": "deep", "x": ' + b"[" * depth + b"]" * depth + b"}"
    path.write_bytes(line + b"\n" + request("b"))
    with BatchFile(path) as batch:
        deeper(20, batch.scan)
        hashes = batch.id_hashes().tolist()
        for num_calls in (0, 200, 600):
            rows = deeper(num_calls, lambda: list(batch.rows()))
            assert [hash_id(row.custom_id) for row in rows] == hashes
            assert isinstance(rows[1], Row)
