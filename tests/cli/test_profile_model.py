"""``elbowroom train profile``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elbowroom.cli.exit_codes import EXIT_BAD_INPUT, EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.core.layer_graph_file import read_layer_graph

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """\
import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))

def make_batch(generator):
    return torch.randn(5, 8, generator=generator), torch.zeros(5, dtype=torch.int64)

loss_fn = nn.functional.cross_entropy
"""
QUICK = ["--seconds", "0", "--threads", "1"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What is said of a command that does nothing."""
    assert main(["train", "profile", *command]) == EXIT_BAD_INPUT
    return " ".join(capsys.readouterr().err.split())


def test_a_profile_is_printed_and_written(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "p.json", tmp_path / "p.txt"
    command = ["train", "profile", str(script), "--out", str(out), "--text", str(text)]
    assert main([*command, *QUICK]) == EXIT_GOOD
    assert torch.get_num_threads() == 1
    graph = read_layer_graph(out)
    assert all(layer.memory is not None for layer in graph.layers[1:])
    bare = tuple(
        replace(layer, memory=None, gradient_bytes=None, update_seconds=0.0)
        for layer in graph.layers
    )
    assert replace(graph, layers=bare) == read_layer_graph(text)
    assert [layer.name for layer in graph.layers] == ["input", "0", "1", "2"]
    assert [layer.activation_bytes for layer in graph.layers] == [160, 80, 80, 40]
    assert [layer.parameter_bytes for layer in graph.layers] == [0, 144, 0, 40]
    shown = capsys.readouterr()
    assert "Linear(in_features=8, out_features=4, bias=True)" in shown.out
    assert "4 layers: " in shown.out
    assert "outputs 360 B, parameters 184 B" in shown.out
    assert f"s taken: plan with `elbowroom train plan-pipeline {out}`" in " ".join(
        shown.err.split()
    )
    assert "profiler" not in shown.err
    plan = ["train", "plan-pipeline", str(out), "--workers", "2", "--bandwidth", "1Gbit/s"]
    assert main(plan) == EXIT_GOOD


def test_names_with_brackets_are_printed(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "class Odd(nn.ReLU):\n    def __repr__(self):\n        return 'Odd[red](3)[/red]'\n\n"
    script.write_text(
        SCRIPT.replace("def make_model", f"{named}def make_model").replace("nn.ReLU()", "Odd()")
    )
    assert (
        main(["train", "profile", str(script), "--out", str(tmp_path / "p"), *QUICK]) == EXIT_GOOD
    )
    assert "Odd[red](3)[/red]" in capsys.readouterr().out


def test_tied_weights_are_told(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = "m = nn.Linear(8, 8)\n    return nn.Sequential(m, nn.ReLU(), m)"
    script.write_text(
        SCRIPT.replace("return nn.Sequential", f"{tied}\n    return nn.Sequential", 1)
    )
    assert (
        main(["train", "profile", str(script), "--out", str(tmp_path / "p"), *QUICK]) == EXIT_GOOD
    )
    assert "0, 0_1 share weights, statistics or memory: plans keep them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["make_model", "make_batch", "loss_fn"])
def test_a_script_without_a_function(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    script.write_text(SCRIPT.replace(name, "another"))
    assert f"defines no {name}" in refused(capsys, str(script), "--out", str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("import torch\n", "import torh\n", "line 1: ModuleNotFoundError: No module named 'torh'"),
        ("nn.ReLU()", "nn.ReLU(8, 8)", "make_model failed: line 5: TypeError"),
        (
            "return nn.Seq",
            "return 3 #",
            "must return a torch.nn.modules.module.Module, not 3",
        ),
        ("generator), torch", "generator) #", "make_batch must return a tuple"),
        ("randn(5, 8,", "randn(5, 7,", "does not run on this batch: mat1 and mat2 shapes"),
        ("zeros(5,", "zeros(6,", "loss_fn failed on the model's outputs: Expected input batch"),
    ],
)
def test_scripts_that_fail(
    script: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    script.write_text(SCRIPT.replace(old, new))
    out = tmp_path / "p.json"
    assert words in refused(capsys, str(script), "--out", str(out))
    assert not out.exists()


def test_a_model_that_cannot_be_traced(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (
        "class Jumps(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def make_model():\n"
        "    return Jumps()\n"
        "def other"
    )
    script.write_text(SCRIPT.replace("def make_model", model))
    said = refused(capsys, str(script), "--out", str(tmp_path / "p"))
    assert "the forward of Jumps cannot be traced" in said
    assert "script.py:6: `return x if x.sum() > 0 else -x`" in said
    assert "nn.Sequential of blocks" in said


@pytest.mark.parametrize("flag", ["--out", "--text"])
@pytest.mark.parametrize("where", ["/dev/null", "/dev/null/p.json", "/proc/p.json"])
def test_output_that_cannot_be_written_fails_before_the_script_runs(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, where: str
) -> None:
    ran = tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')\n{SCRIPT}")
    files = {"--out": str(tmp_path / "p"), flag: where}
    flags = [word for pair in files.items() for word in pair]
    assert where in refused(capsys, str(script), *flags)
    assert not ran.exists()


def test_files_that_are_no_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "p")]
    assert "there is no script" in refused(capsys, str(tmp_path / "none.py"), *out)
    other = tmp_path / "script.txt"
    other.write_text(SCRIPT)
    assert "its name must end in .py" in refused(capsys, str(other), *out)


def test_other_commands_do_not_wait_for_torch() -> None:
    check = "import sys, elbowroom.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
