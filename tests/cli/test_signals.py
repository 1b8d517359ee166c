"""Ctrl-C and SIGTERM in each phase of a run: it ends soon, keeps what it has, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.stub_run import PHASES
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]
NUM_ROWS = 12
MOST_SECONDS = 10


class Run:
    """A run in a folder of its own, with a cache of its own, to be started as often as wanted."""

    def __init__(self, folder: Path) -> None:
        model = write_model(folder / "model")
        given = write_batch(folder / "in.jsonl", NUM_ROWS)
        self.output = folder / "out.jsonl"
        self.flags = ["--model", model, "--input", given, "--output", self.output]
        self.flags += ["--memory", "64MiB", "--max-num-seqs", "4"]
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment.pop(
            "PYTHONUNBUFFERED", None
        )  # few users have it, and it hides what is left

    def start(self, phase: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.cli.stub_run", phase, *map(str, self.flags)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=pipe, stderr=pipe
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal(
    phase: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    if phase != "measuring":
        run.environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]  # where it is measured
    process = run.start(phase)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n", process.communicate()[1]
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.2)
    begin = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begin < MOST_SECONDS
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert f"stopped by {number.name}" in " ".join(said.split())
    assert "run the same command again" in " ".join(said.split())
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not run.output.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in left if name.startswith((".", "elbowroom-"))], left
    run.environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    again = run.start("none")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert len(run.output.read_text().splitlines()) == NUM_ROWS


def test_a_signal_that_a_script_s_shell_had_ignored(tmp_path: Path) -> None:
    """As of what it starts in the background."""
    run = Run(tmp_path)
    run.environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = run.start("starting")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_reader_that_leaves_does_not_end_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    process = run.start("none")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert len(run.output.read_text().splitlines()) == NUM_ROWS


def test_the_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.flags += ["--grace", "600"]
    run.environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    process = run.start("running")
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "rows in flight have their time"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said) == (75, False), said
    assert time.monotonic() - begin < MOST_SECONDS
