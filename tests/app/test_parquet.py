"""Whole jobs whose input or output is a Parquet file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import elbowroom
from elbowroom.cli.main import main
from tests.app.stub_command import Jobs
from tests.app.test_batch import SMALL
from tests.jobs.plans import write_batch
from tests.jobs.test_parquet import pq, write_table


@pytest.fixture
def jobs(jobs: Jobs) -> Jobs:
    jobs.output = jobs.folder / "out.parquet"
    return jobs


def prompts(folder: Path, num_rows: int, **columns: Any) -> Path:
    rows = [
        {"custom_id": f"id-{n}", "prompt": f"say {n}", "max_tokens": 8, **columns}
        for n in range(num_rows)
    ]
    return write_table(folder / "in.parquet", rows)


def ids(path: Path) -> list[str]:
    found: list[str] = pq.read_table(path).column("custom_id").to_pylist()
    return found


def test_from_table_to_table(jobs: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    path = prompts(jobs.folder, 20)
    assert jobs.run(path) == 0
    assert jobs.run(path) == 0
    assert ids(jobs.output) == [f"id-{n}" for n in range(20)]
    row = pq.read_table(jobs.output).to_pylist()[3]
    assert json.loads(row["response"])["text"] == "say 3"
    assert (row["status_code"], row["prompt_tokens"], row["completion_tokens"]) == (200, 4, 2)
    assert main(["verify", str(path), str(jobs.output)]) == 0
    assert main(["status", str(jobs.output)]) == 0
    capfd.readouterr()
    assert main(["results", str(jobs.output)]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 20, "JSON lines, of a running job too"
    assert main(["check", str(path)]) == 0


def test_failed_rows_are_a_table_beside_it(jobs: Jobs) -> None:
    path = prompts(jobs.folder, 20)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    errors = pq.read_table(jobs.folder / "out.errors.parquet").to_pylist()
    assert [row["status_code"] for row in errors] == [400, 400]
    assert main(["verify", str(path), str(jobs.output)]) == 0
    assert jobs.run(path, more=("--errors", str(jobs.folder / "e.jsonl"))) == 3
    assert [row["custom_id"] for row in errors] == jobs.ids("e.jsonl")
    jobs.stub = []
    assert jobs.run(path, more=("--retry-failed",)) == 0
    assert len(ids(jobs.output)) == 20
    assert not (jobs.folder / "out.errors.parquet").exists()


def test_a_stopped_job_resumes_with_rows_added(jobs: Jobs) -> None:
    path = prompts(jobs.folder, 40)
    jobs.stub = ["--killed-after", "12", "--lives", "9"]
    assert jobs.run(path, more=("--max-restarts", "0")) == 75
    assert not jobs.output.exists()
    jobs.stub = []
    prompts(jobs.folder, 60, temperature=0.0)
    assert jobs.run(path) == 2, "a new column changes rows that were answered"
    prompts(jobs.folder, 60, temperature=None)
    assert jobs.run(path) == 0
    assert ids(jobs.output) == [f"id-{n}" for n in range(60)]


def test_a_job_whose_input_becomes_a_table(jobs: Jobs) -> None:
    """Rows are found again by what they say; they may come in several files of any form."""
    plain = write_batch(jobs.folder / "in.jsonl", 10)
    other = write_table(jobs.folder / "b.parquet", [{"custom_id": "b", "prompt": "b"}])
    assert jobs.run(other, plain) == 0
    jobs.stub = ["--log", str(jobs.folder / "answered")]
    assert jobs.run(prompts(jobs.folder, 11), other) == 0
    assert (jobs.folder / "answered").read_text().split() == ["10"]
    assert ids(jobs.output) == [*(f"id-{n}" for n in range(11)), "b"]


def test_a_table_of_others_is_left_alone(jobs: Jobs) -> None:
    path = prompts(jobs.folder, 3)
    assert jobs.run(prompts(jobs.folder, 3)) == 0
    before = path.read_bytes()
    jobs.output = path
    assert jobs.run(path, more=("--overwrite",)) == 2, "the input"
    jobs.output = jobs.folder / "other.parquet"
    jobs.output.write_bytes(before)
    assert jobs.run(path) == 2
    assert jobs.output.read_bytes() == before
    assert jobs.run(path, more=("--overwrite",)) == 0
    assert len(ids(jobs.output)) == 3


def test_a_table_without_pyarrow(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert jobs.run("f02_part1.jsonl") == 2
    assert jobs.num_started == 0


def test_from_python(jobs: Jobs) -> None:
    path = prompts(jobs.folder, 5)
    report = elbowroom.run_batch(jobs.model, path, str(jobs.output), **SMALL)
    assert report.num_succeeded == 5
    assert ids(jobs.output) == [f"id-{n}" for n in range(5)]
