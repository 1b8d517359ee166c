"""kill -9 at random points: every row comes out once, and nothing that was safe is done again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from elbowroom.core.errors import InputError
from elbowroom.jobs.journal_reader import JournalReader
from tests.jobs.plans import write_batch

pytestmark = pytest.mark.timeout(1800)  # a hundred processes

ROOT = Path(__file__).parents[2]
NUM_ROWS = 3000
NUM_KILLS = int(os.environ.get("ELBOWROOM_STUB_KILLS", "8"))
NUM_REPLICAS = 2
OPTIONS = ("--latency", "0.004", "--core", "--anonymous")


class CrashJob:
    """A job of stub replicas in a folder of its own."""

    def __init__(self, folder: Path, num_rows: int = NUM_ROWS) -> None:
        self.folder = folder
        for name in ("run", "pids"):
            (folder / name).mkdir(parents=True)
        self.answered = folder / "answered"
        self.answered.touch()
        write_batch(folder / "in.jsonl", num_rows)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.jobs.stub_job", str(self.folder)]
        return subprocess.Popen([*command, str(NUM_REPLICAS), *OPTIONS], cwd=ROOT)

    def safe_rows(self) -> set[int]:
        """Rows in the journal."""
        try:
            with JournalReader(self.folder / "out.jsonl") as journal:
                lines = list(journal.lines())
        except InputError:
            return set()
        return {int(json.loads(line)["custom_id"].removeprefix("id-")) for line in lines}

    def answered_since(self, offset: int) -> list[int]:
        return [int(line) for line in self.answered.read_bytes()[offset:].split()]

    def processes(self, kind: str) -> list[psutil.Process]:
        """Live replicas, or their engine cores."""
        found = []
        for path in (self.folder / "pids").iterdir():
            if path.name.startswith("core") == (kind == "core"):
                with suppress(psutil.NoSuchProcess, IndexError):  # gone, or not yet written
                    process = psutil.Process(int(path.read_text().split()[-1]))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def results(self) -> tuple[bytes, bool]:
        return (self.folder / "out.jsonl").read_bytes(), (self.folder / "err.jsonl").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    job = CrashJob(tmp_path_factory.mktemp("uninterrupted"))
    assert job.start().wait(120) == 0
    output, has_errors = job.results()
    assert not has_errors
    ids = [json.loads(line)["custom_id"] for line in output.splitlines()]
    assert ids == [f"id-{index}" for index in range(NUM_ROWS)]
    return output


def test_the_runner_is_killed(tmp_path: Path, uninterrupted: bytes) -> None:
    """Anywhere from its first import to its last rename; each run goes on with the last."""
    chance = random.Random(0)
    num_kills = 0
    for number in range(100):
        job = CrashJob(tmp_path / str(number))
        offset, safe = 0, set[int]()
        while True:
            run = job.start()
            with suppress(subprocess.TimeoutExpired):
                # Half of the points in the few milliseconds before the end of the job.
                run.wait(chance.uniform(0.05, 2.5))
            if run.poll() is None:
                num_kills += 1
                run.kill()
            code = run.wait()
            _wait_until_gone(job)
            again = safe & set(job.answered_since(offset))
            assert not again, "rows that were safe were answered again"
            if code == 0:
                break
            assert code == -signal.SIGKILL
            offset, safe = job.answered.stat().st_size, job.safe_rows()
        assert job.results() == (uninterrupted, False)
        if num_kills >= NUM_KILLS:
            return
    raise AssertionError(f"only {num_kills} kills")


@pytest.mark.parametrize("kind", ["replica", "core"])
def test_replicas_and_engine_cores_are_killed(
    tmp_path: Path, uninterrupted: bytes, kind: str
) -> None:
    chance = random.Random(1)
    num_kills = 0
    for number in range(100):
        job = CrashJob(tmp_path / str(number))
        run = job.start()
        while run.poll() is None and num_kills < NUM_KILLS:
            # Rows of the last death are tried by themselves: killing those too would, rightly,
            # be held against them.
            target = len(job.safe_rows()) + 40 + chance.randrange(100)
            while run.poll() is None and len(job.safe_rows()) < target:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.02))
            if processes := job.processes(kind):
                with suppress(psutil.NoSuchProcess):
                    chance.choice(processes).kill()
                    num_kills += 1
        assert run.wait(120) == 0
        assert job.results() == (uninterrupted, False)
        answered = job.answered_since(0)
        assert len(answered) - len(set(answered)) <= 8 * num_kills, "more than rows in flight"
        if num_kills >= NUM_KILLS:
            return
    raise AssertionError(f"only {num_kills} kills")


def _wait_until_gone(job: CrashJob) -> None:
    """Replicas and cores die with the runner."""
    deadline = time.monotonic() + 10
    while job.processes("replica") or job.processes("core"):
        assert time.monotonic() < deadline, "processes of a dead runner are left"
        time.sleep(0.01)


def test_nothing_is_left_of_a_runner_that_was_killed(tmp_path: Path) -> None:
    job = CrashJob(tmp_path / "job")
    run = job.start()
    deadline = time.monotonic() + 20
    while len(job.processes("core")) < NUM_REPLICAS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    _wait_until_gone(job)
    assert job.start().wait(60) == 0
    assert list((job.folder / "run").iterdir()) == [], "the next run sweeps"
