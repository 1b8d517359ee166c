"""Verification: whatever is wrong with results is counted, and some of it named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elbowroom.core.errors import InputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.results import error_line, response_line
from elbowroom.jobs.verify import Verification, verify_results
from tests.jobs.plans import write_batch


def verify(folder: Path, succeeded: list[str], failed: list[str]) -> Verification:
    output, errors = folder / "out", folder / "err"
    output.write_bytes(b"".join(response_line(name, 200, {}) for name in succeeded))
    errors.write_bytes(b"".join(error_line(name, "code", "message") for name in failed))
    with BatchFile(folder / "in.jsonl") as batch:
        return verify_results(batch.scan(), [output, errors])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_batch(tmp_path / "in.jsonl", 4)
    return tmp_path


def test_complete_results_in_any_order_are_good(folder: Path) -> None:
    verification = verify(folder, ["id-3", "id-0"], ["id-2", "id-1"])
    assert verification.is_good
    assert str(verification) == "each of 4 rows has exactly one result"
    assert verification.to_json()["is_good"]


def test_what_is_wrong_is_counted_and_named(folder: Path) -> None:
    verification = verify(folder, ["id-0", "id-0", "other"], ["id-0", "id-2"])
    assert not verification.is_good
    assert verification.missing == ("id-1", "id-3")
    assert verification.repeated == ("id-0",)
    assert verification.unknown == ("other",)
    assert "2 missing (id-1, id-3); 1 more than once (id-0); 1 not in" in str(verification)


def test_only_some_are_named(tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 100)
    verification = verify(tmp_path, [], [])
    assert verification.num_missing == 100
    assert len(verification.missing) == 10


def test_lines_without_an_id_count_under_the_made_up_one(folder: Path) -> None:
    with (folder / "in.jsonl").open("a") as file:
        file.write('{broken\n{"custom_id": "id-0"}\n')
    ids = [f"id-{n}" for n in range(4)]
    assert verify(folder, ids, ["line-5", "line-6"]).is_good
    assert verify(folder, ids, ["line-5"]).missing == ("line-6",)


@pytest.mark.parametrize("line", ["{", "[]", "{}", json.dumps({"custom_id": 7}), "[" * 10**5])
def test_a_file_that_holds_no_results(folder: Path, line: str) -> None:
    (folder / "out").write_bytes(response_line("id-0", 200, {}) + line.encode())
    with BatchFile(folder / "in.jsonl") as batch, pytest.raises(InputError, match="line 2"):
        verify_results(batch.scan(), [folder / "out"])


def test_a_file_that_is_not_there(folder: Path) -> None:
    with BatchFile(folder / "in.jsonl") as batch, pytest.raises(InputError, match="cannot read"):
        verify_results(batch.scan(), [folder / "nothing"])
