"""``elbowroom train plan-grid``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import elbowroom
from elbowroom.cli.exit_codes import EXIT_BAD_INPUT, EXIT_GOOD
from elbowroom.cli.grid_table import print_grid_plan
from elbowroom.cli.main import main
from elbowroom.cli.screen import Console
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.known_nets import known_net
from elbowroom.core.layer_shapes import LayerShape, ModelShapes, write_model_shapes
from elbowroom.planning.grid.plan import PlannedGrid, explain_grid, plan_grid
from elbowroom.planning.grid.settings import KNL, GridLink, GridSettings
from elbowroom.plans.grid import GridPlan, LayerGrid, write_grid_plan

ALEXNET = ["train", "plan-grid", "alexnet", "--procs", "8", "--batch", "2048"]


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """Words of each line, by the first."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    try:
        code = main(["train", "plan-grid", *command])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else -1
    assert code == EXIT_BAD_INPUT
    return " ".join(capsys.readouterr().err.split())


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.json"
    assert main([*ALEXNET, "--json", str(out)]) == EXIT_GOOD
    planned = plan_grid(known_net("alexnet"), 8, 2048, KNL)
    assert elbowroom.read_grid_plan(out) == planned.plan
    lines = shown(capsys)
    found = planned.explanation
    for layer in found.layers:
        words = lines[layer.grid.name]
        assert " ".join(words).startswith(str(layer.grid))
        assert ("layout" in words) == (layer.terms.moves > 0)
        assert f"{layer.terms.communication * 1e3:.3f}" in words
    counted = explain_grid(
        known_net("alexnet"), planned.plan, GridSettings(8, 2048, GridLink(0.0, 1.0))
    )
    assert f"{counted.layers[6].terms.communication / 2**20:.4g}" in lines["fc7"]
    assert lines["iteration"][0] == f"{found.seconds * 1e3:.3f}"
    assert found.batch_seconds is not None and found.paper_seconds is not None
    assert f"{found.batch_seconds / found.seconds:.2f}x" in lines["by"]
    assert f"{found.paper_seconds / found.seconds:.2f}x" in lines["paper"]
    assert str(planned.plan.prediction.messages) in lines["sent"]
    assert lines["link"][:4] == ["2", "us,", "48", "Gbit/s;"]


def test_flags_are_the_planners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.json"
    flags = ["--latency", "5us", "--bandwidth", "1GB/s", "--flops", "3T", "--memory", "2GB"]
    flags += ["--forms", "linear", "--no-overlap", "--json", str(out)]
    assert main([*ALEXNET, *flags]) == EXIT_GOOD
    planned = plan_grid(
        *(known_net("alexnet"), 8, 2048, GridLink(5e-6, 1e9)),
        forms="linear", flops_per_second=3e12, memory_bytes=2 * 10**9, overlap=False,
    )  # fmt: skip
    assert elbowroom.read_grid_plan(out) == planned.plan
    assert shown(capsys)["link"] == ["5", "us,", "8", "Gbit/s"]


def test_a_cluster_gives_link_rate_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.json"
    assert main([*ALEXNET, "--cluster", "h100-8", "--json", str(out)]) == EXIT_GOOD
    cluster = read_cluster("h100-8")
    between = cluster.link(8)
    planned = plan_grid(
        *(known_net("alexnet"), 8, 2048),
        GridLink(between.latency_seconds, between.bandwidth.achieved),
        flops_per_second=cluster.device.flops.achieved,
        memory_bytes=cluster.device.usable_bytes,
    )
    assert elbowroom.read_grid_plan(out) == planned.plan
    assert planned.plan.prediction.compute_seconds > 0
    assert "h100-8;" in shown(capsys)["link"]
    small = refused(capsys, *ALEXNET[2:], "--cluster", "h100-8", "--memory", "100MB")
    assert "more workers" in small
    # A network joins nodes.
    assert main([*ALEXNET[:4], "16", *ALEXNET[5:], "--cluster", "h100-2x8"]) == EXIT_GOOD
    two = read_cluster("h100-2x8").link(16)
    assert f"{two.latency_seconds * 1e6:.4g}" in shown(capsys)["link"]


def profile() -> ModelShapes:
    layers = (
        LayerShape("x", "input", (), (4, 6)),
        LayerShape("one", "linear", ("x",), (4, 8), weights=48, flops=384),
        LayerShape("sort", "whole", ("one",), (4, 8)),
        LayerShape("two", "linear", ("sort",), (4, 2), weights=16, flops=128),
    )
    return ModelShapes(layers, ("two",), 4)


def test_a_profile_with_a_layer_without_a_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    write_model_shapes(path, profile())
    command = ["train", "plan-grid", str(path), "--procs", "2", "--batch", "16"]
    assert main(command) == EXIT_GOOD
    lines = shown(capsys)
    assert lines["whole"][0] == "sort:"
    assert lines["sort"][0] == "whole"
    assert main([*command[:4], "32", *command[5:]]) == EXIT_GOOD
    assert shown(capsys)["by"][:2] == ["batch", "none:"]


def test_a_narrow_terminal_has_fewer_columns() -> None:
    shapes = known_net("resnet50")
    grids = tuple(LayerGrid(layer.name) for layer in shapes.weighted)
    plan = GridPlan(4, 8, grids)
    explanation = explain_grid(shapes, plan, GridSettings(4, 8, KNL))
    screen = Console(file=io.StringIO(), width=50, force_terminal=True, color_system=None)
    print_grid_plan(screen, PlannedGrid(plan, explanation), explanation)
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    table = text[: text.index("\ngrid  ")].splitlines()
    assert len(table) == len(explanation.layers) + 1
    assert max(map(len, table)) <= 50
    assert all("x 1 x 1" in line for line in table[1:])


@pytest.mark.parametrize("width", [45, 60, 80, 110])
def test_columns_are_left_out_before_any_is_cut(width: int) -> None:
    planned = plan_grid(known_net("resnet50"), 8, 2, KNL, flops_per_second=1e12)
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_grid_plan(screen, planned, planned.explanation)
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    lines = text[: text.index("\ngrid  ")].splitlines()
    assert max(map(len, lines)) <= width
    assert ("compute" in lines[0]) == (width == 110)
    for line, layer in zip(lines[1:], planned.explanation.layers, strict=True):
        assert line.split()[0] == layer.grid.name


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["lenet", "--procs", "2", "--batch", "4"], "none of alexnet"),
        (["alexnet", "--batch", "4"], "--procs"),
        (["alexnet", "--procs", "0", "--batch", "4"], "--procs"),
        (["alexnet", "--procs", "2"], "--batch"),
        (["alexnet", "--procs", "99999999", "--batch", "4"], "procs"),
        (["alexnet", "--procs", "2", "--batch", "4", "--latency", "2"], "--latency"),
        (["alexnet", "--procs", "2", "--batch", "4", "--flops", "fast"], "--flops"),
        (["alexnet", "--procs", "2", "--batch", "4", "--forms", "some"], "--forms"),
        (["alexnet", "--procs", "2", "--batch", "4", "--cluster", "nope"], "nope"),
        (
            ["alexnet", "--procs", "2", "--batch", "4", "--cluster", "h100-8", "--latency", "2us"],
            "leave out --cluster",
        ),
        (["alexnet", "--procs", "64", "--batch", "4", "--cluster", "h100-8"], "no link"),
        (["alexnet", "--procs", "509", "--batch", "2", "--forms", "paper"], "linear or all"),
    ],
)
def test_what_cannot_be_planned(
    capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    assert words in refused(capsys, *command)


def test_files_that_are_no_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    more = ["--procs", "2", "--batch", "4"]
    for text in ("", "{}", "[]", '{"format": "elbowroom layer shapes", "version": 1}'):
        path.write_text(text)
        assert "train profile SCRIPT --shapes" in refused(capsys, str(path), *more)
    write_model_shapes(path, profile())
    assert "--json" in refused(capsys, str(path), *more, "--json", str(path))


def test_names_of_the_package(tmp_path: Path) -> None:
    planned = elbowroom.plan_grid(known_net("alexnet"), 4, 64, KNL)
    assert planned.plan.procs == 4
    write_grid_plan(tmp_path / "grid.json", planned.plan)
    assert elbowroom.read_grid_plan(str(tmp_path / "grid.json")) == planned.plan
