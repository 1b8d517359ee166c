"""The way of a user: a script, its step's profile, a plan for a budget, and training by it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import islice
from pathlib import Path

import pytest

from elbowroom.app.swap_training import SwapRunOptions, train_swapped
from elbowroom.cli.exit_codes import EXIT_FAILURE, EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.step_profile import read_step_profile
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.plans.swap import read_swap_plan
from elbowroom.training.checkpoint import newest_checkpoint
from elbowroom.training.loop import LoopOptions, TrainingLoop
from elbowroom.training.script import load_script
from tests.swap.steps import needed_meter

SCRIPT = """
import torch
from torch import nn

SIDE = 32


def make_model():
    blocks = []
    for width in (3, 16, 16):
        blocks += [nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    head = [nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*blocks, *head)


def make_batch(generator):
    x = torch.randn(8, 3, SIDE, SIDE, generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


def loss_fn(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)
"""


@pytest.fixture(autouse=True)
def metered(one_thread: None) -> None:
    needed_meter()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script, the profile of its step, and a plan half way between its floor and keeping all."""
    tmp_path = tmp_path_factory.mktemp("made")
    script, step = tmp_path / "train.py", tmp_path / "step.json"
    script.write_text(SCRIPT)
    measure = ["train", "profile", str(script), "--step", "--out", str(step), "--threads", "1"]
    assert main([*measure, "--seconds", "0.1", "--tier", str(tmp_path)]) == EXIT_GOOD
    profile = read_step_profile(step)
    budget = (floor_bytes(profile) + peak_bytes(profile, ())) // 2
    out = ["--budget", str(budget), "--tier", str(tmp_path), "--json", str(tmp_path / "plan.json")]
    assert main(["train", "plan-swap", str(step), *out]) == EXIT_GOOD
    return tmp_path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of what was made, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def run(folder: Path, *flags: str) -> int:
    words = ["train", "run", str(folder / "train.py"), "--plan", str(folder / "plan.json")]
    return main([*words, "--steps", "5", *flags])


def plain_losses(script: Path, options: LoopOptions) -> list[float]:
    loop = TrainingLoop(load_script(script), options)
    losses = []
    for batch in loop.batches():
        losses.append(loop.backward(batch))
        loop.update()
    return losses


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_losses_are_those_of_the_plain_loop(folder: Path, clip_norm: float | None) -> None:
    plan = read_swap_plan(folder / "plan.json")
    assert plan.choices and Path(plan.tier).is_dir() and plan.num_threads == 1
    options = LoopOptions(6, seed=3, clip_norm=clip_norm)
    said: list[str] = []
    script = folder / "train.py"
    losses = train_swapped(script, plan, options, SwapRunOptions(verify=True), said.append)
    assert losses == plain_losses(script, options)
    assert losses[0] != losses[-1]
    peak = next(line for line in said if line.startswith("peak")).split()[1:]
    assert peak[:2] == peak[2:]  # predicted and measured


def test_an_optimizer_that_is_swapped(made: Path, tmp_path: Path) -> None:
    """Its plan says so; the run's losses are the plain ones, before and after a stop."""
    script, step = made / "train.py", tmp_path / "step.json"
    measure = ["train", "profile", str(script), "--step", "--out", str(step), "--threads", "1"]
    assert (
        main([*measure, "--seconds", "0.1", "--swap-optimizer", "--clip-norm", "0.1"]) == EXIT_GOOD
    )
    profile, plain = read_step_profile(step), read_step_profile(made / "step.json")
    assert profile.swaps_optimizer and profile.static_bytes < plain.static_bytes
    plan = plan_swap(profile, floor_bytes(profile))
    assert plan.swaps_optimizer
    options = SwapRunOptions(checkpoints=tmp_path / "weights")
    losses = []
    for num_steps in (3, 6):
        said: list[str] = []
        loop = LoopOptions(num_steps, clip_norm=0.1)
        losses += train_swapped(script, plan, loop, options, said.append)
        peak = next(line for line in said if line.startswith("peak")).split()[1:]
        assert peak[:2] == peak[2:]
    assert losses == plain_losses(script, LoopOptions(6, clip_norm=0.1))


def test_a_run_reports_traces_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_swap_plan(folder / "plan.json")
    files = [folder / name for name in ("trace.json", "memory.svg")]
    assert run(folder, "--trace", str(files[0]), "--picture", str(files[1])) == EXIT_GOOD
    shown = capsys.readouterr()
    assert "5 steps" in shown.out
    assert f"{len(plan.choices)} of {len(plan.storages)}" in shown.err
    events = json.loads(files[0].read_text())["traceEvents"]
    outs = [event for event in events if event["name"] == str(plan.transfers[0])]
    assert len(outs) == 5
    curves: dict[str, list[float]] = {}
    for event in events:
        if event["ph"] == "C":
            curves.setdefault(event["name"], []).append(event["args"][event["name"]])
    predicted, held = curves["predicted bytes"], curves["held bytes"]
    assert len(predicted) == len(held) == 5 * (plan.num_ticks + 1)
    assert max(predicted) == plan.peak_bytes
    close = [abs(one - other) <= 4096 for one, other in zip(predicted, held, strict=True)]
    assert all(close[plan.num_ticks + 1 :])
    picture = ElementTree.fromstring(files[1].read_text())
    areas = [each for each in picture.iter() if each.tag.endswith("polyline")]
    assert len(areas) == 4  # two curves, and each in the legend
    assert max(len(each.attrib["points"].split()) for each in areas) == 2 * plan.num_ticks + 4


def test_a_step_beyond_the_budget_ends_the_run(folder: Path) -> None:
    """The script's batch has grown since it was profiled."""
    script = folder / "train.py"
    script.write_text(SCRIPT.replace("SIDE = 32", "SIDE = 96"))
    plan = read_swap_plan(folder / "plan.json")
    options = LoopOptions(2)
    with pytest.raises(MemoryPlanError):
        train_swapped(script, plan, options, SwapRunOptions(), print)
    said: list[str] = []
    train_swapped(script, plan, options, SwapRunOptions(enforce=False), said.append)
    assert any("2 steps are not the one" in line for line in said)


def test_scripts_that_fail_are_named(folder: Path) -> None:
    script = folder / "train.py"
    plan = read_swap_plan(folder / "plan.json")
    for bad in ("return outputs", "return 1.0", "raise KeyError('x')"):
        script.write_text(
            SCRIPT.replace("return nn.functional.cross_entropy(outputs, targets)", bad)
        )
        with pytest.raises(InputError, match=re.escape(str(script))):
            train_swapped(script, plan, LoopOptions(2), SwapRunOptions(), print)


def test_a_run_resumes_as_if_it_had_not_stopped(folder: Path) -> None:
    script, plan = folder / "train.py", read_swap_plan(folder / "plan.json")
    options = SwapRunOptions(checkpoints=folder / "weights", every=2)
    first = train_swapped(script, plan, LoopOptions(3), options, print)
    second = train_swapped(script, plan, LoopOptions(7), options, print)
    assert [*first, *second] == plain_losses(script, LoopOptions(7))
    names = sorted(path.name for path in (folder / "weights").iterdir())
    assert names == ["step-00000006", "step-00000007"]
    model = load_script(script).make_model(9)
    checkpoint = newest_checkpoint(folder / "weights")
    assert checkpoint is not None
    checkpoint.load_weights(model)
    with pytest.raises(InputError):  # nothing is left to do
        train_swapped(script, plan, LoopOptions(7), options, print)
    with pytest.raises(InputError):  # of another run
        train_swapped(script, plan, LoopOptions(9, seed=1), options, print)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "plan.json", "--semantics", "flush"),
        ("run", "plan.json", "--microbatches", "2", "--timeout", "7"),
        ("run", "plan.json", "--max-restarts", "1"),
        ("run", "step.json", "--verify"),
        ("run", "plan.json", "--tier", "/no/folder"),
    ],
)
def test_what_cannot_be_run(
    folder: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command, plan, *flags = words
    script = str(folder / "train.py")
    code = main(["train", command, script, "--plan", str(folder / plan), "--steps", "1", *flags])
    assert code not in (0, 1)
    error = capsys.readouterr().err
    for flag in flags[::2]:
        if flag != "--tier":
            assert flag in error or plan == "step.json"


def test_no_file_that_is_read_is_written_over(folder: Path) -> None:
    """Nor one that is written twice."""
    script, step, plan = (str(folder / name) for name in ("train.py", "step.json", "plan.json"))
    once = str(folder / "once")
    files = [path for path in folder.iterdir() if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    steps = ["--steps", "1"]
    for words in (
        ["profile", script, "--step", "--out", script],
        ["profile", script, "--out", script],
        ["plan-swap", step, "--budget", "1GiB", "--json", step],
        ["plan-swap", step, "--budget", "1GiB", "--json", once, "--trace", once],
        ["run", script, "--plan", plan, *steps, "--trace", plan],
        ["run", script, "--plan", plan, *steps, "--picture", script],
        ["run", script, "--plan", plan, *steps, "--picture", once, "--trace", once],
    ):
        assert main(["train", *words]) not in (0, 1), words
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_what_a_step_cannot_be_profiled_with(folder: Path) -> None:
    script, out = str(folder / "train.py"), str(folder / "out.json")
    for flags in (["--step", "--workers", "2"], ["--tier", "x"], ["--autocast", "bf16"]):
        assert main(["train", "profile", script, "--out", out, *flags]) == 2
    assert not Path(out).exists()


def test_a_budget_one_byte_below_the_floor(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = read_step_profile(folder / "step.json")
    floor = floor_bytes(profile)
    assert plan_swap(profile, floor).peak_bytes == floor
    words = ["train", "plan-swap", str(folder / "step.json"), "--budget"]
    assert main([*words, f"{floor - 1}"]) != EXIT_GOOD
    assert str(floor) in capsys.readouterr().err


def test_a_run_that_is_stopped(folder: Path) -> None:
    command = (sys.executable, "-m", "elbowroom", "train", "run", str(folder / "train.py"))
    flags = ("--plan", str(folder / "plan.json"), "--steps", "1000000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *flags], text=True, **pipes) as process:
        assert process.stdout is not None
        first = list(islice(process.stdout, 1))
        assert first and first[0].startswith("step ")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAILURE
    assert "SIGTERM" in errors and "Traceback" not in errors
