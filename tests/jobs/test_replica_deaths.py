"""Replicas that die, hang or never start: what the job does, and what is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.core.errors import JobStoppedError, ReplicaError
from elbowroom.jobs.job import Job, JobOptions
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from tests.jobs.plans import make_plan
from tests.jobs.stub_runs import StubJob, lines_of


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
    errors = lines_of(job.files.errors)
    assert [error["custom_id"] for error in errors] == [f"id-{number}" for number in killers]
    assert errors[0]["error"]["code"] == "engine_crashed"
    assert "line 8: " in errors[0]["error"]["message"]
    job.check_nothing_is_left(published=True)


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
