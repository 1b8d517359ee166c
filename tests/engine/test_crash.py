"""Real engines under kill -9: every row once, the same answers, nothing left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from elbowroom.app.plan_settings import PlanSettings
from elbowroom.core.units import MIB
from elbowroom.jobs.journal_reader import JournalReader, journal_folder
from elbowroom.plans.pool import RunPlan, write_run_plan
from elbowroom.pool.run_dir import default_root
from tests.jobs.plans import plan_here

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]  # many starts of engines

DEMO = Path(__file__).parents[2] / "examples" / "demo"
NUM_KILLS = int(os.environ.get("ELBOWROOM_KILLS", "2"))
"""Kills of the runner, at its start and at work in turns; of replicas and of cores each."""

NUM_SHIPPING_KILLS = int(os.environ.get("ELBOWROOM_SHIPPING_KILLS", "1"))
"""Kills of replicas and of cores each, while others wait for rows that they shipped."""

RUN_SECONDS = 200.0


class DemoJob:
    """The demo with two replicas of few rows at once, so that it takes some seconds.

    ``ships`` has a streamed pool, of which every batch that fits a buffer is shipped.
    """

    def __init__(self, folder: Path, ships: bool = False) -> None:
        folder.mkdir()
        self.output = folder / "out.jsonl"
        self.plan = folder / "plan.json" if ships else None
        self.family: dict[int, psutil.Process] = {}
        self.run: subprocess.Popen[str]

    def start(self) -> None:
        files = ("--input", str(DEMO / "requests.jsonl"), "--output", str(self.output))
        command = [sys.executable, "-m", "elbowroom", "run", *files]
        if self.plan is not None:
            write_run_plan(self.plan, self.shipping_plan())
            command += ["--plan", str(self.plan)]
        else:
            command += ["--model", str(DEMO / "model"), "--served-model-name", "demo"]
            command += ["--replicas", "2", "--memory", "64MiB", "--max-num-seqs", "4"]
        self.run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def shipping_plan(self) -> RunPlan:
        settings = PlanSettings(
            model=DEMO / "model",
            memory_bytes=64 * MIB,
            replicas=2,
            pool="shipped",
            max_num_seqs=4,
            served_model_names=("demo",),
        )
        return plan_here(settings).shipping_below(10**6)

    def look(self) -> None:
        """Take note of the processes of the run."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.run.pid).children(recursive=True):
                self.family.setdefault(process.pid, process)

    def wait_for(self, is_true: Callable[[], bool]) -> bool:
        """Whether it came true before the run ended."""
        deadline = time.monotonic() + RUN_SECONDS
        while self.run.poll() is None:
            self.look()
            if is_true():
                return True
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return False

    def wait_for_rows(self, num_more: int) -> bool:
        target = self.num_finished() + num_more
        return self.wait_for(lambda: self.num_finished() >= target)

    def wait_for_kind(self, kind: str) -> bool:
        return self.wait_for(lambda: bool(self.alive(kind)))

    def wait_seconds(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        return self.wait_for(lambda: time.monotonic() >= until)

    def alive(self, kind: str) -> list[psutil.Process]:
        """Replicas or engine cores that live now."""
        self.look()
        found = []
        for process in self.family.values():
            with suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                is_core = "spawn_main" in title or "EngineCore" in title  # it renames itself
                is_replica = "engine.replica" in title
                if (is_core if kind == "core" else is_replica) and process.is_running():
                    found.append(process)
        return found

    def kill_one(self, kind: str) -> None:
        random.Random(self.run.pid).choice(self.alive(kind)).kill()

    def interrupt_twice(self) -> None:
        """What a user does who cannot wait for the rows in flight."""
        for _ in range(2):
            os.kill(self.run.pid, signal.SIGINT)
            time.sleep(0.05)

    def num_finished(self) -> int:
        if not journal_folder(self.output).exists():
            return 0
        try:
            with JournalReader(self.output) as journal:
                return journal.totals().num_finished
        except Exception:  # it is just being made
            return 0

    def end(self) -> int:
        _, message = self.run.communicate(timeout=RUN_SECONDS)
        deadline = time.monotonic() + 10
        while [process for process in self.family.values() if process.is_running()]:
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.05)
        if self.run.returncode not in (0, -signal.SIGKILL):
            print(message)
        return self.run.returncode

    def answers(self) -> list[dict[str, Any]]:
        """Results without the one thing that is not the same in every run."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        for line in lines:
            del line["response"]["body"]["created"]
        return lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run that nobody disturbs is looked at while it runs."""
    before = set(default_root().glob("elbowroom-*"))
    job = DemoJob(tmp_path_factory.mktemp("demo") / "job")
    job.start()
    assert job.wait_for_rows(1), "it was too fast to be looked at"
    _check_privacy(job, set(default_root().glob("elbowroom-*")) - before)
    assert job.end() == 0
    answers = job.answers()
    assert len(answers) == 500
    assert set(default_root().glob("elbowroom-*")) <= before
    return answers


def _check_privacy(job: DemoJob, run_dirs: set[Path]) -> None:
    """Nothing listens on a port, files are for their owner only, vLLM unpickles no message."""
    processes = [psutil.Process(job.run.pid), *job.alive("replica"), *job.alive("core")]
    assert len(processes) == 5
    for process in processes:
        assert not [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in process.environ()
    assert len(run_dirs) == 1
    journal = journal_folder(job.output)
    for folder in (*run_dirs, journal, journal / "logs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in set(folder.iterdir()) - {journal / "logs"}:
            is_socket = stat.S_ISSOCK(path.stat().st_mode)
            assert is_socket or stat.S_IMODE(path.stat().st_mode) == 0o600, path


def _check_that_it_resumes(job: DemoJob, uninterrupted: list[dict[str, Any]]) -> None:
    finished = job.num_finished()
    assert 0 < finished < 500
    job.start()
    assert job.end() == 0
    assert job.answers() == uninterrupted
    report = json.loads(job.output.with_suffix(".report.json").read_text())
    assert report["num_resumed"] == finished, "finished rows were not computed again"


def test_one_job_survives_every_kind_of_kill(
    tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    """One journal, four runs: at the end each row once, and none that had finished twice."""
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
    job.start()
    for kind in ("replica", "core"):
        assert job.wait_for_rows(20)
        job.kill_one(kind)
    assert job.wait_for_rows(20)
    begin = time.monotonic()
    job.interrupt_twice()
    assert job.end() == 75
    assert time.monotonic() - begin < 15
    assert not job.output.exists()
    _check_that_it_resumes(job, uninterrupted)


@pytest.mark.nightly
def test_the_runner_is_killed(tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    chance = random.Random(0)
    job = DemoJob(tmp_path / "job")
    for number in range(NUM_KILLS):
        job.start()
        at_work = number % 2 == 1
        is_on = job.wait_for_rows(1) if at_work else job.wait_seconds(chance.uniform(1, 12))
        assert is_on, "the job was done before it could be killed"
        job.run.kill()
        job.end()
    _check_that_it_resumes(job, uninterrupted)


@pytest.mark.parametrize(
    ("ships", "least_kills"),
    [
        pytest.param(False, NUM_KILLS, marks=pytest.mark.nightly),
        pytest.param(True, NUM_SHIPPING_KILLS),
    ],
)
def test_replicas_and_engine_cores_are_killed(
    tmp_path: Path, uninterrupted: list[dict[str, Any]], ships: bool, least_kills: int
) -> None:
    """One of each kind in each run, the one while engines start in the first run."""
    chance = random.Random(1)
    num_kills = {"replica": 0, "core": 0}
    while min(num_kills.values()) < least_kills:
        job = DemoJob(tmp_path / str(sum(num_kills.values())), ships)
        job.start()
        for kind in sorted(num_kills, key=lambda kind: num_kills[kind]):
            is_first = not any(num_kills.values())
            more_rows = 0 if is_first else chance.randrange(1, 100)
            if job.wait_for_kind(kind) and job.wait_for_rows(more_rows) and job.alive(kind):
                chance.choice(job.alive(kind)).kill()
                num_kills[kind] += 1
        code = job.end()
        if code == 1:  # the first start of an engine fails as one that never works
            assert job.num_finished() == 0
            job.start()
            code = job.end()
        assert code == 0
        assert job.answers() == uninterrupted
        report = json.loads(job.output.with_suffix(".report.json").read_text())
        assert report["num_succeeded"] == 500
        assert any(replica["pool"]["shipped_rows"] for replica in report["replicas"]) == ships
