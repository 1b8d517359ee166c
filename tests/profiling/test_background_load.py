"""Background processes sweep while one is measured, and are gone afterwards, however it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from elbowroom.core.errors import MeasuringError
from elbowroom.profiling.background_load import background_load

SCRIPT = """\
import os
from pathlib import Path

import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU())

def make_batch(generator):
    return torch.randn(5, 8, generator=generator), torch.zeros(5, 4)

def loss_fn(outputs, targets):
    with Path(__file__).with_name(str(os.getpid())).open("a") as file:
        file.write("x")
    print("what a script prints goes nowhere")
    return nn.functional.mse_loss(outputs, targets)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def sweeps(script: Path) -> dict[int, int]:
    """Ids of the processes that ran the script."""
    files = [path for path in script.parent.iterdir() if path.name.isdecimal()]
    return {int(path.name): path.stat().st_size for path in files}


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_they_sweep_until_the_block_ends(script: Path) -> None:
    with background_load(2, script, 0, 1):
        wait_until(lambda: len(sweeps(script)) == 2 and min(sweeps(script).values()) > 3)
        assert all(map(psutil.pid_exists, sweeps(script)))
    assert not any(map(psutil.pid_exists, sweeps(script)))


def test_they_end_with_whoever_is_killed(script: Path) -> None:
    flags = ("--out", str(script.with_suffix(".json")), "--seconds", "600", "--workers", "2")
    command = (sys.executable, "-m", "elbowroom", "train", "profile", str(script), *flags)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(sweeps(script)) == 2)
        assert process.pid in sweeps(script)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, sweeps(script))))


def test_one_that_fails_is_told(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text("raise ValueError('mine')")
    ended = pytest.raises(MeasuringError, match="ended with code")
    with ended as caught, background_load(2, script, 0, 1):
        pytest.fail("they were not ready")
    assert capfd.readouterr().err == "", "tracebacks go to a file"
    log = Path(str(caught.value).rpartition(": ")[2])
    assert "ValueError: mine" in log.read_text()
    log.unlink()
