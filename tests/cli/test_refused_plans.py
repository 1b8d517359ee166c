"""Plans that cannot be made, or not be run for the model that is there: exit code 2 and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elbowroom.cli.main import main
from tests.cli.command import Command
from tests.cli.test_refusals import FP8_ROWS, two_modules
from tests.planning.facts import CPU, MODELS
from tests.tiny_model import LAYERS, write_model

PLANS = {
    "layers": ({"num_hidden_layers": LAYERS - 1}, "for 3 layers, and model has 2"),
    "no pool": ({"quantization_config": FP8_ROWS}, "cannot be pooled"),
}


@pytest.mark.parametrize(("config", "words"), PLANS.values(), ids=PLANS)
def test_a_plan_for_another_model(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    words: str,
) -> None:
    path, model = command.folder / "plan.json", command.folder / "model"
    job = ("--model", str(model), "--lengths", "8:8x4", "--memory", "64MiB")
    asked = ("--replicas", "2", "--pool", "streamed", "--dtype", "bfloat16")
    assert main(["plan", *job, *asked, "--json", str(path)]) == 0
    write_model(model, **config)
    capsys.readouterr()
    assert run_plan(command, path) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_plan_whose_rows_cannot_be_shipped(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans for other clusters have such layouts, to compare with."""
    path, model = command.folder / "plan.json", command.folder / "model"
    write_model(model, two_modules())
    cluster = command.folder / "cluster.toml"
    cluster.write_text(CPU.to_toml())
    job = ("--model", str(model), "--lengths", "8:8x4", "--cluster", str(cluster))
    asked = ("--replicas", "2", "--tensor-parallel", "1", "--pool", "shipped", "--slots", "2")
    assert main(["plan", *job, *asked, "--json", str(path)]) == 0
    capsys.readouterr()
    assert run_plan(command, path) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "model cannot be run as t1d2 shipped 2 slots: its layers have several feed-forward" in said
    )


def run_plan(command: Command, path: Path) -> int:
    files = [part for flag in ("--input", "--output") for part in (flag, command.flags[flag])]
    return main(["run", "--plan", str(path), *files])


PLANNED = {
    "devices": (
        ("--tensor-parallel", "2", "--replicas", "3"),
        "3 replicas of 2 devices cannot be had: h200-8 has 8 devices",
    ),
    "rows": (("--max-model-len", "10"), "the shortest has 128, and it takes 10"),
    "memory": (
        ("--memory", "200GiB"),
        "200 GiB of each NVIDIA H200 SXM, which has 140.4 GiB",
    ),
}


@pytest.mark.parametrize(("flags", "words"), PLANNED.values(), ids=PLANNED)
def test_a_plan_is_refused(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    job = ("--model", str(MODELS / "Llama-3.1-8B"), "--cluster", "h200-8", "--lengths", "64:64x50")
    assert main(["plan", *job, *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
