"""Real engines under kill -9: every row once, the same answers, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.demo_job import DemoJob

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]  # many starts of engines

NUM_KILLS = int(os.environ.get("ELBOWROOM_KILLS", "2"))
"""Kills of the runner, at its start and at work in turns; of replicas and of cores each."""


def _check_that_it_resumes(job: DemoJob, undisturbed: DemoJob, pool: str = "streamed") -> None:
    finished = job.num_finished()
    assert 0 < finished < 500
    job.start(pool)
    assert job.end() == 0
    assert job.answers() == undisturbed.answers()
    report = job.report()
    assert report["num_resumed"] == finished, "finished rows were not computed again"
    is_shipped = any(replica["pool"]["shipped_rows"] for replica in report["replicas"])
    assert is_shipped == (pool == "shipped")


def test_one_job_survives_every_kind_of_kill(tmp_path: Path, undisturbed: DemoJob) -> None:
    """One journal, four runs: at the end each row once, and none that had finished twice.

    Replicas and cores are killed while others wait for rows that they shipped.
    """
    job = DemoJob(tmp_path / "job")
    job.start()
    assert job.wait_for_kind("core")
    job.run.kill()  # while engines start
    job.end()
    job.start()
    assert job.wait_for_kind("replica")
    job.kill_one("replica")  # before it was ever ready
    if job.wait_for_rows(1):
        job.run.kill()
    assert job.end() in (-signal.SIGKILL, 1), "1: an engine that ends at its start never works"
    job.start("shipped")
    for kind in ("replica", "core"):
        assert job.wait_for_rows(20)
        job.kill_one(kind)
    assert job.wait_for_rows(20)
    begin = time.monotonic()
    job.interrupt_twice()
    assert job.end() == 75
    assert time.monotonic() - begin < 15
    assert not job.output.exists()
    _check_that_it_resumes(job, undisturbed, "shipped")


@pytest.mark.nightly
def test_the_runner_is_killed(tmp_path: Path, undisturbed: DemoJob) -> None:
    chance = random.Random(0)
    job = DemoJob(tmp_path / "job")
    for number in range(NUM_KILLS):
        job.start()
        at_work = number % 2 == 1
        is_on = job.wait_for_rows(1) if at_work else job.wait_seconds(chance.uniform(1, 12))
        assert is_on, "the job was done before it could be killed"
        job.run.kill()
        job.end()
    _check_that_it_resumes(job, undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("pool", ["streamed", "shipped"])
def test_replicas_and_engine_cores_are_killed(
    tmp_path: Path, undisturbed: DemoJob, pool: str
) -> None:
    """One of each kind in each run, the one while engines start in the first run."""
    chance = random.Random(1)
    num_kills = {"replica": 0, "core": 0}
    while min(num_kills.values()) < NUM_KILLS:
        job = DemoJob(tmp_path / str(sum(num_kills.values())))
        job.start(pool)
        for kind in sorted(num_kills, key=lambda kind: num_kills[kind]):
            is_first = not any(num_kills.values())
            more_rows = 0 if is_first else chance.randrange(1, 100)
            if job.wait_for_kind(kind) and job.wait_for_rows(more_rows) and job.alive(kind):
                chance.choice(job.alive(kind)).kill()
                num_kills[kind] += 1
        code = job.end()
        if code == 1:  # the first start of an engine fails as one that never works
            assert job.num_finished() == 0
            job.start(pool)
            code = job.end()
        assert code == 0
        assert job.answers() == undisturbed.answers()
        report = job.report()
        assert report["num_succeeded"] == 500
        is_shipped = any(replica["pool"]["shipped_rows"] for replica in report["replicas"])
        assert is_shipped == (pool == "shipped")
