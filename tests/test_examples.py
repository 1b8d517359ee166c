"""Every short example runs, and shows what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elbowroom.cli.main import main
from elbowroom.plans.swap import read_swap_plan
from tests.swap.steps import needed_meter

EXAMPLES = Path(__file__).parents[1] / "examples"
LONG = {"train_demo_lm.py", "train_unet3d.py"}
"""Scripts to train, with tests of their own."""


def shown(name: str, *words: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_short_and_say_what_they_show() -> None:
    short = [path for path in EXAMPLES.glob("*.py") if path.name not in LONG]
    assert len(short) >= 6
    for path in short:
        lines = path.read_text().splitlines()
        assert len(lines) < 40, path
        assert lines[0].startswith('"""') and lines[0].endswith("."), path
        assert f"python examples/{path.name}" in lines[2], path


def test_plan_for_cluster() -> None:
    *layouts, best = shown("plan_for_cluster.py").splitlines()
    assert len(layouts) > 2
    assert layouts[0].split()[0] in best


def test_check_file() -> None:
    said = shown("check_file.py")
    assert "4 rows, 3 problems" in said
    assert {"duplicate_custom_id", "limit_exceeded", "invalid_json"} <= set(said.split(": "))


def test_verify_results() -> None:
    good, bad = shown("verify_results.py").splitlines()
    assert "2 rows" in good
    assert "unit" in bad and "sum" in bad


def test_plan_pipeline() -> None:
    gains = [float(line.split()[-4].rstrip("x")) for line in shown("plan_pipeline.py").splitlines()]
    assert gains == sorted(gains)
    assert gains[0] >= 1.0 < gains[-1]


def test_simulate_with_trace(tmp_path: Path) -> None:
    shown("simulate_with_trace.py", tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_train_in_process() -> None:
    words = shown("train_in_process.py").split()
    first, last = float(words[3]), float(words[6])
    assert last < first / 10


def test_train_unet3d(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of its docstring, with fewer steps."""
    needed_meter()
    script, step, plan = str(EXAMPLES / "train_unet3d.py"), tmp_path / "step", tmp_path / "plan"
    measure = ["train", "profile", script, "--step", "--out", str(step)]
    assert main([*measure, "--threads", "1", "--seconds", "0.1"]) == 0
    choose = ["train", "plan-swap", str(step), "--budget", "24MiB", "--json", str(plan)]
    assert main(choose) == 0
    assert main(["train", "run", script, "--plan", str(plan), "--steps", "3"]) == 0
    peak = next(line for line in capsys.readouterr().out.splitlines()[::-1] if "peak  " in line)
    assert peak.split()[1:3] == peak.split()[3:5]
    assert read_swap_plan(plan).choices


@pytest.mark.vllm
def test_iterate_batch(tmp_path: Path) -> None:
    said = shown("iterate_batch.py", tmp_path / "results.jsonl")
    assert {"sum: 72", "unit: 56700 m"} <= set(said.splitlines())
