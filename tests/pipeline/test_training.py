"""The way of a user: a script, its profile, a plan, and torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elbowroom import cli

SCRIPT = """
import torch
from torch import nn


def make_model():
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(5)]
    return nn.Sequential(*blocks, nn.Linear(32, 1))


def make_batch(generator):
    x = torch.randn(16, 32, generator=generator)
    return x, x.sum(1, keepdim=True)


def loss_fn(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script, its profile, and straight plans for 2 and 3 workers."""
    folder = tmp_path_factory.mktemp("training")
    script, profile = folder / "train.py", folder / "profile.json"
    script.write_text(SCRIPT)
    measure = ["profile-model", str(script), "--out", str(profile), "--seconds", "0.2"]
    assert cli.main([*measure, "--threads", "1"]) == 0
    for workers in ("2", "3"):
        plan = ["plan-pipeline", str(profile), "--workers", workers, "--bandwidth", "10Gbit/s"]
        assert cli.main([*plan, "--straight", "--json", str(folder / f"plan{workers}.json")]) == 0
    return folder


def start(
    folder: Path, workers: int, plan: str, *flags: str, torchrun: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    run = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers))
    command = (*run, *torchrun, "-m", "elbowroom.pipeline", str(folder / "train.py"), "--plan")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*command, str(folder / plan), *flags], text=True, env=environment, **pipes
    )


CLIPPED = ("flush", "--microbatches", "4", "--clip-norm", "5", "--autocast", "bf16")


@pytest.mark.parametrize("semantics", [("stash",), CLIPPED], ids=str)
def test_a_script_is_trained(files: Path, tmp_path: Path, semantics: tuple[str, ...]) -> None:
    trace = tmp_path / "trace.json"
    flags = ("--steps", "150", "--semantics", *semantics, "--lr", "0.01", "--trace", str(trace))
    process = start(files, 3, "plan3.json", *flags)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    first, last = re.findall(r"([\d.]+) \(mean of 20\) at", said)
    assert float(last) < 0.5 * float(first)
    assert "150 minibatches in" in said
    assert len(re.findall(r"worker \d, stage \d: .* idle, .* sent a minibatch", said)) == 3
    events = json.loads(trace.read_text())["traceEvents"]
    drawn = [event["name"] for event in events if event["ph"] == "X"]
    parts = 1 if semantics == ("stash",) else 4
    for kind in ("forward", "backward"):
        assert sum(name.startswith(kind) for name in drawn) == 3 * 150 * parts
    assert sum(name.startswith("update") for name in drawn) == 3 * 150


def test_what_cannot_be_run(files: Path) -> None:
    wrong_number = start(files, 3, "plan2.json", "--steps", "3")
    said, _ = wrong_number.communicate(timeout=120)
    assert wrong_number.returncode != 0
    assert "is for 2 workers, and there are 3" in said
    plan = json.loads((files / "plan2.json").read_text())
    plan["stages"][0]["layers"] = ["nowhere"]
    (files / "other.json").write_text(json.dumps(plan))
    other = start(files, 2, "other.json", "--steps", "3")
    said, _ = other.communicate(timeout=120)
    assert other.returncode != 0
    assert "plan again with a profile of this model" in said


def test_a_worker_that_dies(files: Path) -> None:
    """The others end within seconds, and say who it was."""
    process = start(files, 3, "plan3.json", "--steps", "1000000", "--trace", str(files / "t"))
    assert process.stdout is not None
    while "loss" not in process.stdout.readline():
        assert process.poll() is None
    children = psutil.Process(process.pid).children()
    next(one for one in children if one.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 40
    assert process.returncode != 0
    assert re.search(r"worker 1 ended|rank *: 1", said), said
