"""Whole jobs with stub replicas: every row once and in order, and every way in which one dies."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError, JobStoppedError, OutputError
from elbowroom.core.units import MIB
from elbowroom.jobs.job import JobOptions, StopRequest
from tests.jobs.plans import write_batch
from tests.jobs.stub_runs import ROOT, StubJob, lines_of


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
    errors = lines_of(job.files.errors)
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
    assert len(lines_of(job.files.errors)) == 5


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


@pytest.mark.parametrize("is_restart", [True, False])
def test_who_restarted_is_not_told_to_drop_what_is_finished(job: StubJob, is_restart: bool) -> None:
    job.options = JobOptions(restart=is_restart)
    threading.Timer(0.5, job.stop, ["enough"]).start()
    with pytest.raises(JobStoppedError) as stopped:
        job.run("--never-ready")
    assert ("without --restart" in str(stopped.value)) == is_restart


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
