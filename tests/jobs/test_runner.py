"""Whole jobs with stub replicas: every row once and in order, and every way in which one dies."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elbowroom.core.errors import OutputError, ReplicaError
from elbowroom.core.units import MIB
from elbowroom.jobs.batch_file import scan
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import JobFiles, run_job
from elbowroom.pool import run_dir as run_dir_module
from tests.jobs.plans import make_plan, write_batch

ROOT = Path(__file__).parents[2]


class Job:
    """One job in a folder of its own: its files, its stub replicas, what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.run_root = folder / "run"
        self.pids = folder / "pids"
        self.results = folder / "results"
        for path in (self.run_root, self.pids, self.results):
            path.mkdir()
        self.files = JobFiles(
            input=folder / "batch.jsonl",
            output=self.results / "out.jsonl",
            errors=self.results / "err.jsonl",
            report=self.results / "report.json",
        )
        self.screen = StringIO()
        self.batch(40)

    def batch(self, num_rows: int, **body: Any) -> None:
        write_batch(self.files.input, num_rows, **body)

    def run(
        self, *options: object, num_replicas: int = 1, seconds: float = 60.0, max_num_seqs: int = 8
    ) -> JobReport:
        command = [sys.executable, "-m", "tests.jobs.stub_replica", "--pids", str(self.pids)]
        job = run_job(
            make_plan(num_replicas, max_num_seqs=max_num_seqs),
            self.files,
            scan(self.files.input),
            Console(file=self.screen, width=200),
            [*command, *(str(option) for option in options)],
        )
        return asyncio.run(asyncio.wait_for(job, seconds))

    def answers(self) -> list[dict[str, Any]]:
        return _lines(self.files.output)

    def check_nothing_is_left(self, published: bool = False) -> None:
        assert not list(self.run_root.iterdir()), "the run directory was left"
        assert bool(list(self.results.iterdir())) == published, "results of a run that failed"
        for path in self.pids.iterdir():
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.read_text()), 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job(tmp_path)
    monkeypatch.setattr(run_dir_module, "default_root", lambda: job.run_root)
    monkeypatch.chdir(ROOT)
    return job


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_row_once_in_input_order(job: Job, num_replicas: int) -> None:
    report = job.run("--latency", 0.005, num_replicas=num_replicas)
    answers = job.answers()
    assert [answer["custom_id"] for answer in answers] == [f"id-{i}" for i in range(40)]
    for index, answer in enumerate(answers):
        assert answer["response"]["body"]["text"] == f"say {index}"
    share = Counter(answer["response"]["body"]["rank"] for answer in answers)
    assert len(share) == num_replicas, "a replica had nothing to do"
    assert min(share.values()) >= 5
    assert (report.num_rows, report.num_succeeded, report.num_failed) == (40, 40, 0)
    assert (report.prompt_tokens, report.output_tokens) == (160, 80)
    assert [replica.num_kv_tokens for replica in report.replicas] == [1000] * num_replicas
    assert [replica.wait_seconds for replica in report.replicas] == [0.25] * num_replicas
    assert not job.files.errors.exists()
    assert json.loads(job.files.report.read_text())["num_succeeded"] == 40
    job.check_nothing_is_left(published=True)


def test_failed_and_rejected_rows_go_to_the_error_file(job: Job) -> None:
    with job.files.input.open("a") as file:
        file.write('{broken\n{"custom_id": "id-3"}\n')
    report = job.run("--refuses", 10)
    assert report.failures == {"http_400": 4, "invalid_json": 1, "duplicate_custom_id": 1}
    errors = _lines(job.files.errors)
    refused = ["id-9", "id-19", "id-29", "id-39"]
    assert [error["custom_id"] for error in errors] == [*refused, "line-41", "line-42"]
    assert {error["response"]["status_code"] for error in errors[:4]} == {400}
    assert [error["error"]["code"] for error in errors[4:]] == [
        "invalid_json",
        "duplicate_custom_id",
    ]
    assert "line 41" in errors[4]["error"]["message"]
    assert len(job.answers()) == 36
    assert report.num_succeeded + report.num_failed == 42


def test_a_file_of_nothing_but_rejected_rows(job: Job) -> None:
    job.files.input.write_text("{\n" * 5)
    report = job.run()
    assert report.failures == {"invalid_json": 5}
    assert job.answers() == []
    assert len(_lines(job.files.errors)) == 5


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("latency", [0, 0.01])
def test_a_replica_that_is_killed_ends_the_job_at_once(
    job: Job, num_replicas: int, latency: float
) -> None:
    job.batch(400)
    start = time.monotonic()
    options = ["--rank", num_replicas - 1, "--killed-after", 20, "--latency", latency]
    with pytest.raises(ReplicaError, match=f"replica {num_replicas - 1} was killed by SIGKILL"):
        job.run(*options, num_replicas=num_replicas)
    assert time.monotonic() - start < 10
    job.check_nothing_is_left()


def test_a_replica_that_says_why_it_failed(job: Job) -> None:
    with pytest.raises(ReplicaError, match="replica 1 failed: no memory for layer 17"):
        job.run("--rank", 1, "--fails", "no memory for layer 17", num_replicas=2)
    job.check_nothing_is_left()


def test_a_replica_that_crashes_shows_its_log(job: Job) -> None:
    log = "\n".join(f"log line {number}" for number in range(40))
    with pytest.raises(ReplicaError, match="replica 0 exited with 3") as caught:
        job.run("--crashes", log)
    assert "| log line 39" in str(caught.value)
    assert "log line 2\n" not in str(caught.value), "the end of the log is enough"
    job.check_nothing_is_left()


def test_logs_are_kept_where_they_were_asked_for(job: Job, tmp_path: Path) -> None:
    job.files = JobFiles(
        job.files.input, job.files.output, job.files.errors, job.files.report, tmp_path / "a" / "b"
    )
    with pytest.raises(ReplicaError):
        job.run("--crashes", "it was the disk")
    assert (tmp_path / "a" / "b" / "replica-0.log").read_text() == "it was the disk\n"
    job.check_nothing_is_left()


def test_a_command_that_does_not_exist(job: Job) -> None:
    plan, facts = make_plan(2), scan(job.files.input)
    with pytest.raises((ReplicaError, OSError)):
        asyncio.run(run_job(plan, job.files, facts, Console(file=job.screen), ["/no/such/thing"]))
    job.check_nothing_is_left()


def test_a_job_that_is_cancelled_while_it_waits_for_a_replica(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elbowroom.jobs.group._GRACE_SECONDS", 0.3)
    with pytest.raises(TimeoutError):
        job.run("--rank", 1, "--never-ready", num_replicas=2, seconds=2.0)
    assert len(list(job.pids.iterdir())) == 2, "the stubs did not start in time"
    job.check_nothing_is_left()


def test_a_job_that_is_cancelled_among_its_rows(job: Job) -> None:
    with pytest.raises(TimeoutError):
        job.run("--latency", 30, num_replicas=2, seconds=2.0)
    job.check_nothing_is_left()


def test_a_replica_that_hears_nothing_is_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elbowroom.jobs.group._GRACE_SECONDS", 0.3)
    options = ["--rank", 1, "--deaf", "--latency", 30]
    with pytest.raises(TimeoutError):
        job.run(*options, num_replicas=2, seconds=2.0)
    assert len(list(job.pids.iterdir())) == 2
    job.check_nothing_is_left()


def test_replicas_need_not_stop_at_the_same_time(job: Job) -> None:
    """One is gone before the other has sent its last counters: both did their work."""
    report = job.run("--rank", 1, "--stop-seconds", 0.7, num_replicas=2)
    assert report.num_succeeded == 40
    job.check_nothing_is_left(published=True)


def test_a_full_disk_ends_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("cannot write: No space left on device")

    monkeypatch.setattr("elbowroom.jobs.spool.Spool.put", refuse)
    with pytest.raises(OutputError):
        job.run(num_replicas=2)
    job.check_nothing_is_left()


@pytest.mark.parametrize("body", [{"n": -1}, {"max_tokens": 10**400}, {"max_tokens": -1}])
def test_one_odd_row_does_not_end_the_job(job: Job, body: dict[str, Any]) -> None:
    odd = {"custom_id": "odd", "method": "POST", "url": "/v1/completions"}
    row = json.dumps({**odd, "body": {"prompt": "x", **body}}) + "\n"
    job.files.input.write_text(row + job.files.input.read_text() + row.replace("odd", "last"))
    assert job.run().num_succeeded == 42


@pytest.mark.parametrize(("resident", "warns"), [(0, False), (40 * MIB, False), (500 * MIB, True)])
def test_memory_that_differs_from_the_account_is_mentioned(
    job: Job, resident: int, warns: bool
) -> None:
    job.run("--resident-bytes", resident)
    assert ("warning: replica 0 holds 500 MiB" in job.screen.getvalue()) == warns


def test_lines_on_the_screen(job: Job) -> None:
    job.run()
    assert "40/40 rows" in job.screen.getvalue()


_MEASURE = """
import asyncio, resource, sys
from pathlib import Path
from rich.console import Console
from elbowroom.jobs.batch_file import scan
from elbowroom.jobs.runner import JobFiles, run_job
from tests.jobs.plans import make_plan

folder = Path(sys.argv[1])
files = JobFiles(*(folder / name for name in ("in.jsonl", "out.jsonl", "err.jsonl", "report")))
stub = [sys.executable, "-m", "tests.jobs.stub_replica"]
plan = make_plan(1, max_num_seqs=64)
report = asyncio.run(run_job(plan, files, scan(files.input), Console(quiet=True), stub))
print(report.num_succeeded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_runner_memory(tmp_path: Path) -> None:
    """Memory does not grow with the file, beyond a few bytes per row."""
    peak_bytes = {}
    for num_rows in (2_000, 200_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        write_batch(folder / "in.jsonl", num_rows, note="x" * 200)
        command = [sys.executable, "-c", _MEASURE, str(folder)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        succeeded, peak_kib = done.stdout.split()
        assert int(succeeded) == num_rows
        peak_bytes[num_rows] = int(peak_kib) * 1024
    assert (folder / "in.jsonl").stat().st_size > 50 * MIB, "the file itself would not fit"
    assert peak_bytes[200_000] - peak_bytes[2_000] < 40 * MIB
