"""The way of a user: a script, its layers' shapes, a grid for them, and training by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elbowroom.cli.exit_codes import EXIT_BAD_INPUT, EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.plans.grid import GridPlan, LayerGrid, read_grid_plan, write_grid_plan
from elbowroom.training.checkpoint import newest_checkpoint
from elbowroom.training.loop import LoopOptions, TrainingLoop
from elbowroom.training.script import load_script

SCRIPT = """
import torch
from torch import nn


def make_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 4),
    )


def make_batch(generator):
    x = torch.randn(6, 3, 16, 16, generator=generator)
    return x, torch.randint(4, (6,), generator=generator)


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(*words: str | Path) -> int:
    return main(["train", *map(str, words)])


def plain_losses(script: Path, num_steps: int) -> tuple[TrainingLoop, list[float]]:
    loop = TrainingLoop(load_script(script), LoopOptions(num_steps))
    losses = []
    for batch in loop.batches():
        losses.append(loop.backward(batch))
        loop.update()
    return loop, losses


def test_profile_plan_and_run(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On two processes, and on from their checkpoint on one: as one process trains throughout."""
    folder = script.parent
    profile, plan, alone = folder / "p.json", folder / "grid.json", folder / "alone.json"
    checkpoints, trace = folder / "checkpoints", folder / "trace.json"
    assert run("profile", script, "--shapes", "--out", profile, "--seconds", "0.1") == EXIT_GOOD
    grids = ["--procs", "2", "--batch", "6", "--bandwidth", "1MB/s", "--json", plan]
    assert run("plan-grid", profile, *grids) == EXIT_GOOD
    grids_of = read_grid_plan(plan).grid_of
    assert any(grid.outputs * grid.inputs == 2 for grid in grids_of.values()), "slow links"
    kept = ["--checkpoints", checkpoints, "--timeout", "60"]
    assert run("run", script, "--plan", plan, "--steps", "3", *kept, "--trace", trace) == EXIT_GOOD
    loop, losses = plain_losses(script, 5)
    assert f"loss: {sum(losses[:3]) / 3:.4f} (mean of 3) at first" in capfd.readouterr().out
    names = {
        event.get("name", "").split()[0] for event in json.loads(trace.read_text())["traceEvents"]
    }
    assert names >= {"MOVE", "SUM"}
    write_grid_plan(alone, GridPlan(1, 6, tuple(LayerGrid(name) for name in grids_of)))
    assert run("run", script, "--plan", alone, "--steps", "5", *kept) == EXIT_GOOD
    newest = newest_checkpoint(checkpoints)
    assert newest is not None and newest.index.steps == 5
    for name, parameter in loop.model.named_parameters():
        trained = newest.weight([name])
        assert torch.allclose(trained, parameter, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--semantics", "flush"], "--semantics"),
        (["--enforce"], "--enforce"),
        (["--tier", "somewhere"], "--tier"),
    ],
)
def test_flags_of_other_plans(
    script: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = script.parent / "grid.json"
    write_grid_plan(plan, GridPlan(1, 6, (LayerGrid("0"),)))
    assert run("run", script, "--plan", plan, "--steps", "1", *flags) == EXIT_BAD_INPUT
    assert said in capsys.readouterr().err
