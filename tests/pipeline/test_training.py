"""The way of a user: a script, its profile, a plan, and torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed

import elbowroom
from elbowroom.cli.main import main
from elbowroom.plans.pipeline import (
    RESIDENT,
    PipelineOptions,
    StagePlan,
    read_pipeline_plan,
)
from elbowroom.training.checkpoint import newest_checkpoint
from elbowroom.training.script import load_script

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
    """A script, its profile, and straight plans for 2 and 3 workers, of depths 1 and 2.

    The first is for predicted weights; in the second, stages with more than two minibatches in
    flight swap what these have saved.
    """
    folder = tmp_path_factory.mktemp("training")
    script, profile = folder / "train.py", folder / "profile.json"
    script.write_text(SCRIPT)
    measure = ["train", "profile", str(script), "--out", str(profile), "--seconds", "0.2"]
    assert main([*measure, "--threads", "1"]) == 0
    for workers, depth, semantics in (("2", "1", "predict"), ("3", "2", "stash")):
        plan = ["train", "plan-pipeline", str(profile), "--workers", workers, "--depth", depth]
        plan += ["--semantics", semantics]
        out = ["--bandwidth", "10Gbit/s", "--straight", "--json", f"{folder}/plan{workers}.json"]
        assert main([*plan, *out]) == 0
    made = read_pipeline_plan(folder / "plan3.json")
    stages = tuple(
        swapping(stage) if stage.in_flight > RESIDENT else stage for stage in made.stages
    )
    assert stages[0].swapped_bytes
    (folder / "plan3.json").write_text(json.dumps(replace(made, stages=stages).to_json()))
    return folder


def swapping(stage: StagePlan) -> StagePlan:
    """The stage with half of what a minibatch keeps swapped: which half, the run finds."""
    half = stage.kept_bytes // 2
    spared = (stage.in_flight - RESIDENT) * half
    return replace(stage, swapped_bytes=half, memory_bytes=stage.memory_bytes - spared)


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


def train_run(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """The command that reads from the plan how many workers to start."""
    command = (sys.executable, "-m", "elbowroom", "train", "run", str(folder / "train.py"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*command, "--plan", str(folder / "plan3.json"), *flags], text=True, **pipes
    )


CLIPPED = ("--semantics", "flush", "--microbatches", "4", "--clip-norm", "5", "--autocast", "bf16")


@pytest.mark.parametrize("semantics", [(), CLIPPED], ids=str)
def test_a_script_is_trained(files: Path, tmp_path: Path, semantics: tuple[str, ...]) -> None:
    trace = tmp_path / "trace.json"
    flags = ("--steps", "150", *semantics, "--lr", "0.01", "--trace", str(trace))
    process = start(files, 3, "plan3.json", *flags) if semantics else train_run(files, *flags)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    first, last = re.findall(r"([\d.]+) \(mean of 20\) at", said)
    assert float(last) < 0.5 * float(first)
    assert "150 minibatches in" in said
    assert f"weights: {'flush' if semantics else 'stash'}\n" in said
    plan = json.loads((files / "plan3.json").read_text())
    predicted = f"{plan['seconds']:.6f} s planned, {plan['simulated_seconds']:.6f} s simulated, "
    assert (predicted in said) == (not semantics)
    pace = re.search(r"([\d.]+) s measured while the pipe was full: ([\d.]+) samples/s", said)
    assert pace is not None, said
    assert float(pace[1]) * float(pace[2]) == pytest.approx(16, rel=1e-2)
    assert len(re.findall(r"worker \d, stage \d: .* idle, .* sent a minibatch", said)) == 3
    events = json.loads(trace.read_text())["traceEvents"]
    drawn = [event["name"] for event in events if event["ph"] == "X"]
    late = {e["args"]["version"] - 100 for e in events if e["name"] == "forward 100"}
    assert semantics or late == {-4, -2, 0}
    parts = 4 if semantics else 1
    for kind in ("forward", "backward"):
        assert sum(name.startswith(kind) for name in drawn) == 3 * 150 * parts
    assert sum(name.startswith("update") for name in drawn) == 3 * 150


def test_from_python(tmp_path: Path) -> None:
    """All that the package offers to train with, in one process."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    script = load_script(path)
    model, generator = script.make_model(0), torch.Generator().manual_seed(0)
    graph = elbowroom.profile(model, script.make_batch(generator), script.loss_fn)
    predict = PipelineOptions(semantics="predict")
    plan = elbowroom.plan_pipeline(graph, elbowroom.read_cluster("h200-8"), 1, predict)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        read = elbowroom.read_pipeline_plan(tmp_path / "plan.json")
        options = elbowroom.StageOptions(seed=3)
        optimizer_fn = partial(torch.optim.SGD, lr=0.01)
        pipeline = elbowroom.Pipeline(model, read, optimizer_fn, script.loss_fn, options)
        assert pipeline.semantics == "predict", "the plan's, where options name none"
        losses = [pipeline.train_step(script.make_batch(generator)) for _ in range(200)]
        pipeline.close()
    finally:
        distributed.destroy_process_group()
    assert losses[-1] < 0.5 * losses[0]


SCHEDULE = """

from functools import partial

make_optimizer = partial(torch.optim.SGD, lr=0.5)


def make_scheduler(optimizer, num_steps):
    print(f"{num_steps} updates to come")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= num_steps))
"""


def test_a_script_with_an_optimizer_and_a_schedule(files: Path, tmp_path: Path) -> None:
    """The rate is 0 until all updates are done: nothing is learned, at each stage."""
    (tmp_path / "train.py").write_text(SCRIPT + SCHEDULE)
    shutil.copy(files / "plan2.json", tmp_path)
    checkpoints = ("--checkpoints", str(tmp_path / "checkpoints"))
    process = start(tmp_path, 2, "plan2.json", "--steps", "5", *checkpoints)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("5 updates to come") == 2
    assert "weights: predict\n" in said  # as planned
    script = load_script(tmp_path / "train.py")
    trained, fresh = script.make_model(1), script.make_model(0)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and newest.index.steps == 5
    newest.load_weights(trained)
    assert all(map(torch.equal, trained.parameters(), fresh.parameters()))
    assert newest.index.stages[0].groups[0]["lr"] == 0.5
    refused = start(tmp_path, 2, "plan2.json", "--steps", "5", "--lr", "0.1")
    said, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert "makes its own optimizer" in said


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


def test_a_run_that_is_stopped(files: Path, tmp_path: Path) -> None:
    """By SIGINT, or because torchrun is killed: one line, 75, and no worker is left.

    By SIGINT also in the background of a script, whose shell has it ignored.
    """
    flags = ("--steps", "1000000", "--every", "1000000", "--checkpoints", str(tmp_path))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupted, orphaned = train_run(files, *flags), train_run(files, *flags)
    finally:
        signal.signal(signal.SIGINT, before)
    workers = []
    for process in (interrupted, orphaned):
        assert process.stdout is not None
        while "loss" not in process.stdout.readline():
            assert process.poll() is None
        [torchrun] = psutil.Process(process.pid).children()
        workers += torchrun.children()
        process.send_signal(signal.SIGINT) if process is interrupted else torchrun.kill()
    for process, who in ((interrupted, "SIGINT"), (orphaned, "SIGKILL")):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 75, said
        assert re.fullmatch(rf"(step .*\n)*elbowroom: .*{who}; .* resume\n", said), said
    assert len(workers) == 6
    assert not psutil.wait_procs(workers, timeout=10)[1]


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
