"""``elbowroom train profile --shapes``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from elbowroom.cli.exit_codes import EXIT_BAD_INPUT, EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.cli.profile_shapes import print_shapes
from elbowroom.cli.screen import Console
from elbowroom.core.layer_shapes import LayerShape, ModelShapes, read_model_shapes
from tests.cli.test_profile_model import QUICK

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = """\
import torch
from torch import nn

def make_model():
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(stem, nn.Flatten(), nn.Linear(64, 5), nn.Softmax(-1))

def make_batch(generator):
    return torch.randn(6, 3, 4, 4, generator=generator), torch.zeros(6, dtype=torch.int64)

loss_fn = nn.functional.cross_entropy
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_shapes_are_printed_and_written(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    command = ["train", "profile", str(script), "--shapes", "--out", str(out)]
    assert main([*command, *QUICK]) == EXIT_GOOD
    assert torch.get_num_threads() == 1
    shapes = read_model_shapes(out)
    kinds = {layer.name: layer.kind for layer in shapes.layers}
    assert kinds == {
        **{"input": "input", "0.0": "conv", "0.1": "batch_norm", "0.2": "pointwise"},
        **{"1": "reshape", "2": "linear", "3": "whole"},
    }
    assert shapes.batch == 6
    assert shapes.by_name["0.0"].windows[0].before == 1
    assert all(layer.forward_seconds > 0 for layer in shapes.layers if layer.kind != "input")
    assert shapes.by_name["2"].backward_seconds > 0
    shown = capsys.readouterr()
    lines = {line.split()[0]: line.split() for line in shown.out.splitlines()}
    assert lines["0.0"][1:4] == ["conv", "6x4x4x4", "112"]
    assert lines["layers"][1] == "7,"
    assert lines["weights"][1] == str(shapes.num_weights) == "445"
    assert lines["whole"][1] == "3:"
    assert f"plan-grid {out}" in " ".join(shown.err.split())


def test_a_narrow_terminal_has_fewer_columns() -> None:
    layer = LayerShape("a.very.long.name.of.a.layer.in.a.deep.model.conv1", "conv", (), (2, 3, 4))
    screen = Console(file=io.StringIO(), width=50, force_terminal=True, color_system=None)
    print_shapes(screen, ModelShapes((layer,), (layer.name,), 2))
    assert isinstance(screen.file, io.StringIO)
    table = screen.file.getvalue().splitlines()[:2]
    assert "conv" in table[1]
    assert max(map(len, table)) <= 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", "t"], "--text"),
        (["--tier", "t"], "for --step"),
        (["--step"], "--shapes"),
    ],
)
def test_flags_that_do_not_go_with_it(
    script: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    command = ["train", "profile", str(script), "--shapes", "--out", str(tmp_path / "p"), *flags]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_what_is_read_after_it_was_written_into_is_refused(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (
        "class Writes(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(48, 5)\n"
        "    def forward(self, x):\n"
        "        y = self.linear(x.flatten(1))\n"
        "        z = y[:, :2]\n"
        "        z.add_(1)\n"
        "        return y + 1\n"
        "def make_model():\n"
        "    return Writes()\n"
        "def other"
    )
    script.write_text(SCRIPT.replace("def make_model", model))
    out = tmp_path / "p.json"
    command = ["train", "profile", str(script), "--shapes", "--out", str(out), *QUICK]
    assert main(command) == EXIT_BAD_INPUT
    assert "layer 'add_' writes into" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
