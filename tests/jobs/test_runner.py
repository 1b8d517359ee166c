"""Whole jobs with stub replicas: every row once and in order, and every way in which one dies."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elbowroom.core.errors import InputError, JobStoppedError, OutputError, ReplicaError
from elbowroom.core.units import MIB
from elbowroom.jobs.job import Job, JobFiles, JobOptions, StopRequest
from elbowroom.jobs.journal import OnCommit
from elbowroom.jobs.journal_reader import JournalReader
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from elbowroom.pool import run_dir as run_dir_module
from tests.jobs.plans import make_plan, write_batch

ROOT = Path(__file__).parents[2]


class StubJob:
    """One job in a folder of its own: its files, its stub replicas, what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.run_root = folder / "run"
        self.pids = folder / "pids"
        self.results = folder / "results"
        for path in (self.run_root, self.pids, self.results):
            path.mkdir()
        self.input = folder / "batch.jsonl"
        self.files = JobFiles(
            output=self.results / "out.jsonl",
            errors=self.results / "err.jsonl",
            report=self.results / "report.json",
        )
        self.options = JobOptions(max_restarts=5)
        self.stop = StopRequest()
        self.screen = StringIO()
        self.batch(40)

    def batch(self, num_rows: int, **body: Any) -> None:
        write_batch(self.input, num_rows, **body)

    def run(
        self,
        *options: object,
        num_replicas: int = 1,
        seconds: float = 60.0,
        max_num_seqs: int = 8,
        on_rows: OnCommit | None = None,
    ) -> JobReport:
        command = [sys.executable, "-m", "tests.jobs.stub_replica", "--pids", str(self.pids)]
        plan = make_plan(num_replicas, max_num_seqs=max_num_seqs)
        screen = Console(file=self.screen, width=200)
        with scanned(self.input, self.options) as rows:
            job = Job(
                plan, rows, self.files, {"model": "stub"}, self.options, screen, self.stop, on_rows
            )
            run = run_job(job, [*command, *(str(option) for option in options)])
            return asyncio.run(asyncio.wait_for(run, seconds))

    def answers(self) -> list[dict[str, Any]]:
        return _lines(self.files.output)

    def lives(self, replica: int) -> list[int]:
        """Process ids of a replica, one of each life."""
        return [int(line) for line in (self.pids / str(replica)).read_text().splitlines()]

    def num_finished(self) -> int:
        with JournalReader(self.files.output) as journal:
            return journal.totals().num_finished

    def check_nothing_is_left(self, published: bool = False) -> None:
        assert not list(self.run_root.iterdir()), "the run directory was left"
        left = {path.name for path in self.results.iterdir()}
        assert ("out.jsonl" in left) == published, "results of a run that failed"
        assert not any(name.startswith(".") for name in left), "half a file"
        for path in self.pids.iterdir():
            for pid in self.lives(int(path.name)):
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubJob:
    job = StubJob(tmp_path)
    monkeypatch.setattr(run_dir_module, "default_root", lambda *_: job.run_root)
    monkeypatch.setattr("elbowroom.jobs.restarts._FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.chdir(ROOT)
    return job


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_row_once_in_input_order(job: StubJob, num_replicas: int) -> None:
    report = job.run("--latency", 0.005, num_replicas=num_replicas)
    answers = job.answers()
    assert [answer["custom_id"] for answer in answers] == [f"id-{i}" for i in range(40)]
    for index, answer in enumerate(answers):
        assert answer["response"]["body"]["text"] == f"say {index}"
    share = Counter(answer["response"]["body"]["replica"] for answer in answers)
    assert len(share) == num_replicas, "a replica had nothing to do"
    assert min(share.values()) >= 5
    assert (report.num_rows, report.num_succeeded, report.num_failed) == (40, 40, 0)
    assert (report.prompt_tokens, report.output_tokens) == (160, 80)
    assert [replica.num_kv_tokens for replica in report.replicas] == [1000] * num_replicas
    assert [replica.pool.wait_seconds for replica in report.replicas] == [0.25] * num_replicas
    assert not job.files.errors.exists()
    assert json.loads(job.files.report.read_text())["num_succeeded"] == 40
    job.check_nothing_is_left(published=True)


def test_failed_and_rejected_rows_go_to_the_error_file(job: StubJob) -> None:
    with job.input.open("a") as file:
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


@pytest.mark.parametrize(("data", "words"), [(None, "cannot read"), ("\n \n", "has no rows")])
def test_an_input_without_rows_leaves_nothing(job: StubJob, data: str | None, words: str) -> None:
    job.input.unlink()
    if data is not None:
        job.input.write_text(data)
    with pytest.raises(InputError, match=words):
        job.run()
    assert list(job.results.iterdir()) == []
    assert list(job.run_root.iterdir()) == []


def test_a_file_of_nothing_but_rejected_rows(job: StubJob) -> None:
    job.input.write_text("{\n" * 5)
    report = job.run()
    assert report.failures == {"invalid_json": 5}
    assert job.answers() == []
    assert len(_lines(job.files.errors)) == 5


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("latency", [0, 0.01])
def test_a_replica_that_is_killed_is_started_again(
    job: StubJob, num_replicas: int, latency: float
) -> None:
    job.batch(200)
    options = ["--replica", num_replicas - 1, "--killed-after", 20, "--latency", latency]
    report = job.run(*options, num_replicas=num_replicas)
    assert report.num_succeeded == 200
    assert [answer["custom_id"] for answer in job.answers()] == [f"id-{i}" for i in range(200)]
    num_restarts = report.replicas[-1].num_restarts
    assert num_restarts == 1 or num_replicas == 2, "unless the other was faster"
    lives = len(job.lives(num_replicas - 1))
    assert num_restarts <= lives <= 1 + num_restarts, "the last may be ended while it starts"
    assert "was killed by SIGKILL" in job.screen.getvalue()
    job.check_nothing_is_left(published=True)


def test_a_replica_that_dies_while_it_starts_is_started_again(job: StubJob) -> None:
    report = job.run("--replica", 1, "--dies-at-start", num_replicas=2)
    assert [replica.num_restarts for replica in report.replicas] == [0, 1]
    assert report.num_succeeded == 40


def test_the_others_go_on_without_a_replica_that_dies_too_often(job: StubJob) -> None:
    job.batch(150)
    job.options = JobOptions(max_restarts=1)
    options = ["--replica", 1, "--killed-after", 1, "--lives", 99, "--latency", 0.02]
    report = job.run(*options, num_replicas=2)
    assert report.num_succeeded == 150
    assert len(job.lives(1)) == 2
    assert "is given up; the others continue" in job.screen.getvalue()
    job.check_nothing_is_left(published=True)


def test_a_job_without_replicas_stops_and_goes_on_later(job: StubJob) -> None:
    job.batch(150)
    job.options = JobOptions(max_restarts=1)
    with pytest.raises(JobStoppedError, match=r"of 150 rows are finished and kept: run the same"):
        job.run("--killed-after", 20, "--lives", 99)
    job.check_nothing_is_left()
    finished = job.num_finished()
    assert 20 <= finished < 150
    report = job.run()
    assert report.num_resumed == finished
    assert report.num_succeeded == 150
    assert report.run_output_tokens == 2 * (150 - finished), "nothing was computed again"
    job.check_nothing_is_left(published=True)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_row_that_kills_the_engine_is_given_up_and_the_others_are_answered(
    job: StubJob, num_replicas: int
) -> None:
    job.batch(100)
    job.options = JobOptions(max_restarts=3)
    killers = [7, 20, 31, 45, 70, 90]
    options = [text for number in killers for text in ("--killer", f"say {number}")]
    report = job.run(*options, "--lives", 99, "--latency", 0.01, num_replicas=num_replicas)
    assert report.failures == {"engine_crashed": 6}
    assert report.num_succeeded == 94
    errors = _lines(job.files.errors)
    assert [error["custom_id"] for error in errors] == [f"id-{number}" for number in killers]
    assert errors[0]["error"]["code"] == "engine_crashed"
    assert "line 8: " in errors[0]["error"]["message"]
    job.check_nothing_is_left(published=True)


def test_the_same_command_again_publishes_again_and_starts_nothing(job: StubJob) -> None:
    with job.input.open("a") as file:
        file.write("{broken\n")
    job.run("--refuses", 10)
    before = job.files.output.read_bytes(), job.files.errors.read_bytes()
    job.files.output.unlink()
    report = job.run("--refuses", 10)
    assert (job.files.output.read_bytes(), job.files.errors.read_bytes()) == before
    assert (report.num_resumed, report.num_rows, report.num_failed) == (40, 41, 5)
    assert len(job.lives(0)) == 1


def test_an_input_that_grew_costs_only_what_is_new(job: StubJob) -> None:
    job.run()
    job.batch(50)
    report = job.run(num_replicas=2)
    assert (report.num_resumed, report.num_succeeded) == (40, 50)
    assert report.run_output_tokens == 20
    assert [answer["custom_id"] for answer in job.answers()] == [f"id-{i}" for i in range(50)]


def test_a_stop_lets_rows_in_flight_finish(job: StubJob) -> None:
    job.batch(400)
    threading.Timer(1.5, job.stop, ["stopped by SIGTERM"]).start()
    with pytest.raises(JobStoppedError, match=r"stopped by SIGTERM\. \d+ of 400 rows"):
        job.run("--latency", 0.1, num_replicas=2)
    assert "rows in flight have 5 s" in job.screen.getvalue()
    finished = job.num_finished()
    assert 0 < finished < 400
    job.check_nothing_is_left()
    job.stop = StopRequest()
    report = job.run(num_replicas=2)
    assert (report.num_resumed, report.num_succeeded) == (finished, 400)


def test_a_stop_does_not_wait_for_ever(job: StubJob) -> None:
    job.options = JobOptions(grace_seconds=0.3)
    threading.Timer(1.0, job.stop, ["enough"]).start()
    start = time.monotonic()
    with pytest.raises(JobStoppedError, match="0 of 40 rows"):
        job.run("--latency", 60)
    assert time.monotonic() - start < 20
    job.check_nothing_is_left()


def test_a_stop_while_replicas_start(job: StubJob) -> None:
    threading.Timer(0.5, job.stop, ["enough"]).start()
    with pytest.raises(JobStoppedError, match="enough"):
        job.run("--never-ready")
    job.check_nothing_is_left()


def test_rows_are_told_when_they_are_safe(job: StubJob) -> None:
    told: list[int] = []
    job.run(on_rows=lambda rows: told.extend(row.index for row in rows))
    assert sorted(told) == list(range(40))


def test_rows_go_by_order_of_work_and_come_out_in_input_order(job: StubJob) -> None:
    job.batch(40)
    lines = job.input.read_text().splitlines(keepends=True)
    lines[30] = lines[30].replace('"max_tokens": 8', '"max_tokens": 500')
    job.input.write_text("".join(lines))
    first: list[int] = []
    job.run(max_num_seqs=1, on_rows=lambda rows: first.extend(row.index for row in rows))
    assert first[0] == 30, "the longest output first"
    assert [answer["custom_id"] for answer in job.answers()] == [f"id-{i}" for i in range(40)]


def test_a_replica_that_says_why_it_failed(job: StubJob) -> None:
    with pytest.raises(ReplicaError, match="replica 1 failed: no memory for layer 17"):
        job.run("--replica", 1, "--fails", "no memory for layer 17", num_replicas=2)
    job.check_nothing_is_left()


def test_a_replica_that_crashes_shows_its_log(job: StubJob) -> None:
    log = "\n".join(f"log line {number}" for number in range(40))
    with pytest.raises(ReplicaError, match="replica 0 exited with 3") as caught:
        job.run("--crashes", log)
    assert "| log line 39" in str(caught.value)
    assert "log line 2\n" not in str(caught.value), "the end of the log is enough"
    job.check_nothing_is_left()


def test_logs_are_kept_where_they_were_asked_for(job: StubJob, tmp_path: Path) -> None:
    job.files = replace(job.files, logs=tmp_path / "a" / "b")
    with pytest.raises(ReplicaError):
        job.run("--crashes", "it was the disk")
    assert (tmp_path / "a" / "b" / "replica-0.log").read_text() == "it was the disk\n"
    job.check_nothing_is_left()


def test_a_command_that_does_not_exist(job: StubJob) -> None:
    with scanned(job.input, job.options) as rows, pytest.raises((ReplicaError, OSError)):
        asyncio.run(run_job(Job(make_plan(2), rows, job.files, {}), ["/no/such/thing"]))
    job.check_nothing_is_left()


def test_a_job_that_is_cancelled_while_it_waits_for_a_replica(
    job: StubJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elbowroom.jobs.group._GRACE_SECONDS", 0.3)
    with pytest.raises(TimeoutError):
        job.run("--replica", 1, "--never-ready", num_replicas=2, seconds=2.0)
    assert len(list(job.pids.iterdir())) == 2, "the stubs did not start in time"
    job.check_nothing_is_left()


def test_a_job_that_is_cancelled_among_its_rows(job: StubJob) -> None:
    with pytest.raises(TimeoutError):
        job.run("--latency", 30, num_replicas=2, seconds=2.0)
    job.check_nothing_is_left()


def test_a_replica_that_hears_nothing_is_killed(
    job: StubJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elbowroom.jobs.group._GRACE_SECONDS", 0.3)
    options = ["--replica", 1, "--deaf", "--latency", 30]
    with pytest.raises(TimeoutError):
        job.run(*options, num_replicas=2, seconds=2.0)
    assert len(list(job.pids.iterdir())) == 2
    job.check_nothing_is_left()


def test_replicas_need_not_stop_at_the_same_time(job: StubJob) -> None:
    """One is gone before the other has sent its last counters: both did their work."""
    report = job.run("--replica", 1, "--stop-seconds", 0.7, num_replicas=2)
    assert report.num_succeeded == 40
    job.check_nothing_is_left(published=True)


def test_a_full_disk_ends_the_job(job: StubJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OutputError("cannot write: No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("elbowroom.jobs.journal.Journal.commit", refuse)
        with pytest.raises(JobStoppedError, match=r"No space left .* the same command"):
            job.run(num_replicas=2)
    job.check_nothing_is_left()
    assert job.run(num_replicas=2).num_succeeded == 40, "once there is room"


def test_a_full_disk_at_the_end_keeps_all_rows(
    job: StubJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", refuse)
        with pytest.raises(JobStoppedError, match=r"cannot write .*out\.jsonl: No space left"):
            job.run()
    job.check_nothing_is_left()
    assert job.run().num_resumed == 40
    job.check_nothing_is_left(published=True)


@pytest.mark.parametrize("body", [{"n": -1}, {"max_tokens": 10**400}, {"max_tokens": -1}])
def test_one_odd_row_does_not_end_the_job(job: StubJob, body: dict[str, Any]) -> None:
    odd = {"custom_id": "odd", "method": "POST", "url": "/v1/completions"}
    row = json.dumps({**odd, "body": {"prompt": "x", **body}}) + "\n"
    job.input.write_text(row + job.input.read_text() + row.replace("odd", "last"))
    assert job.run().num_succeeded == 42


@pytest.mark.parametrize(("resident", "warns"), [(0, False), (40 * MIB, False), (500 * MIB, True)])
def test_memory_that_differs_from_the_account_is_mentioned(
    job: StubJob, resident: int, warns: bool
) -> None:
    job.run("--resident-bytes", resident)
    assert ("warning: replica 0 holds 500 MiB" in job.screen.getvalue()) == warns


def test_lines_on_the_screen(job: StubJob) -> None:
    job.run()
    assert "40/40 rows" in job.screen.getvalue()


_MEASURE = """
import asyncio, resource, sys
from pathlib import Path
from elbowroom.jobs.job import Job, JobFiles, JobOptions
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from tests.jobs.plans import make_plan

folder = Path(sys.argv[1])
files = JobFiles(*(folder / name for name in ("out.jsonl", "err.jsonl", "report")))
stub = [sys.executable, "-m", "tests.jobs.stub_replica"]
plan = make_plan(1, max_num_seqs=64)
with scanned(folder / "in.jsonl", JobOptions()) as rows:
    report = asyncio.run(run_job(Job(plan, rows, files, {}), stub))
print(report.num_succeeded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_runner_memory(tmp_path: Path) -> None:
    """Memory does not grow with the file, beyond a few bytes per row."""
    peak_bytes = {}
    for num_rows in (2_000, 60_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        write_batch(folder / "in.jsonl", num_rows, note="x" * 900)
        command = [sys.executable, "-c", _MEASURE, str(folder)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        succeeded, peak_kib = done.stdout.split()
        assert int(succeeded) == num_rows
        peak_bytes[num_rows] = int(peak_kib) * 1024
    assert (folder / "in.jsonl").stat().st_size > 50 * MIB, "the file itself would not fit"
    assert peak_bytes[60_000] - peak_bytes[2_000] < 14 * MIB
