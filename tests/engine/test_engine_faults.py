"""Real engines that die: the run ends with a clear error and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elbowroom.pool.run_dir import default_root

pytestmark = pytest.mark.vllm

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def test_killed_engine_core_ends_the_run(tmp_path: Path) -> None:
    before = set(default_root().glob("elbowroom-*"))
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "elbowroom.cli", "run", "--model", str(DEMO / "model")),
            *("--input", str(DEMO / "requests.jsonl"), "--output", str(tmp_path / "out.jsonl")),
            *("--replicas", "2", "--memory", "64MiB"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    family = _wait_for_engine_core(psutil.Process(run.pid))
    os.kill(family[-1].pid, signal.SIGKILL)
    _, message = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "replica" in message
    assert not (tmp_path / "out.jsonl").exists()
    assert [process for process in family if process.is_running()] == []
    assert set(default_root().glob("elbowroom-*")) == before


def _wait_for_engine_core(runner: psutil.Process) -> list[psutil.Process]:
    """All processes of a run, as soon as a replica has spawned its engine core, which is last."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        family = runner.children(recursive=True)
        cores = [process for process in family if "spawn_main" in " ".join(process.cmdline())]
        if cores:
            return [process for process in family if process not in cores] + cores
        time.sleep(0.2)
    raise AssertionError("no engine core appeared")
