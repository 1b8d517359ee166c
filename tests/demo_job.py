"""The demo as a job of two real engines, which tests watch, kill and resume."""

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

DEMO = Path(__file__).parents[1] / "examples" / "demo"
RUN_SECONDS = 200.0


class DemoJob:
    """The demo with two replicas of few rows at once, so that it takes some seconds."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.output = folder / "out.jsonl"
        self.family: dict[int, psutil.Process] = {}
        self.run: subprocess.Popen[str]

    def start(self, pool: str = "streamed") -> None:
        """Begin a run. In a ``shipped`` pool every batch that fits a buffer is shipped."""
        files = ("--input", str(DEMO / "requests.jsonl"), "--output", str(self.output))
        command = [sys.executable, "-m", "elbowroom", "run", *files]
        if pool == "shipped":
            plan = self.output.with_name("plan.json")
            write_run_plan(plan, self.shipping_plan())
            command += ["--plan", str(plan)]
        else:
            command += ["--model", str(DEMO / "model"), "--served-model-name", "demo"]
            command += ["--replicas", "2", "--memory", "64MiB", "--max-num-seqs", "4"]
            command += ["--pool", pool]
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

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.output.with_suffix(".report.json").read_text())
        return report

    def answers(self) -> list[dict[str, Any]]:
        """Results without the one thing that is not the same in every run."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        for line in lines:
            del line["response"]["body"]["created"]
        return lines


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> DemoJob:
    """A streamed run that nobody kills, looked at while it ran."""
    before = set(default_root().glob("elbowroom-*"))
    job = DemoJob(tmp_path_factory.mktemp("demo") / "job")
    job.start()
    assert job.wait_for_rows(1), "it was too fast to be looked at"
    _check_privacy(job, set(default_root().glob("elbowroom-*")) - before)
    assert job.end() == 0
    assert len(job.answers()) == 500
    assert set(default_root().glob("elbowroom-*")) <= before
    return job


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
