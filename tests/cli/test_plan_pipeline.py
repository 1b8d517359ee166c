"""``elbowroom train plan-pipeline``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elbowroom.cli.exit_codes import EXIT_BAD_INPUT, EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.core.layer_graph_file import write_pipedream
from elbowroom.plans.pipeline import read_pipeline_plan
from tests.planning.pipeline.pipelines import PROFILES, chain, profile


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two layers that compute, and a third that has the weights."""
    path = tmp_path / "small.txt"
    layers = chain([(0.3, 10**6, 10**4), (0.3, 10**5, 10**4), (0.1, 10**3, 10**9)])
    path.write_text(write_pipedream(layers))
    return path


def test_a_plan_is_printed_and_written(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "4", "--json", str(out)]
    assert main([*command, "--bandwidth", "1Gbit/s"]) == EXIT_GOOD
    shown = capsys.readouterr().out
    plan = read_pipeline_plan(out)
    assert str(plan) == "3-1"
    assert "small.txt on 4 workers (link 1 Gbit/s), sync ps: 3-1" in shown
    assert "2: n0 .. n1" in shown
    assert f"{plan.seconds:.6f} s a minibatch, 2 in flight; data parallel 6.0" in shown
    assert "link: 247.4 KiB a minibatch; data parallel 2.794 GiB: 100.0% less" in shown


def test_flags_reach_the_planner(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "4", "--json", str(out)]
    flags = ["--bandwidth", "1Gbit/s", "--sync", "allreduce", "--overlap", "sum", "--straight"]
    flags += ["--optimizer", "momentum"]
    assert main([*command, *flags, "--fewer-workers", "--memory", "4GB"]) == EXIT_GOOD
    plan = read_pipeline_plan(out)
    assert str(plan) == "1-1-1"
    assert (plan.options.sync, plan.options.overlap) == ("allreduce", "sum")
    assert plan.options.memory_limit_bytes == 4 * 10**9
    assert plan.options.optimizer == "momentum"
    assert plan.levels[0].bandwidth == 1.25e8


def test_depth_reaches_the_plan(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "2", "--bandwidth", "1Gbit/s"]
    assert main([*command, "--straight", "--depth", "3", "--json", str(out)]) == EXIT_GOOD
    plan = read_pipeline_plan(out)
    assert plan.options.depth == 3
    assert [stage.in_flight for stage in plan.stages] == [4, 1]
    assert "sync ps, depth 3: 1-1" in capsys.readouterr().out


def test_what_is_simulated(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "2", "--bandwidth", "1Gbit/s"]
    files = ["--json", str(out), "--trace", str(trace)]
    assert main([*command, "--straight", *files]) == EXIT_GOOD
    plan, shown = read_pipeline_plan(out), capsys.readouterr().out
    assert f"simulated: {plan.simulated_seconds:.6f} s a minibatch" in shown
    assert plan.simulated_seconds is not None
    idle = [1 - seconds / plan.simulated_seconds for seconds in (0.3, 0.4)]
    assert all(f" {share:.1%} " in shown for share in idle)
    events = json.loads(trace.read_text())["traceEvents"]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert sorted(processes) == ["worker 0", "worker 1"]
    assert sum(event["name"] == "forward 1" for event in events) == 2


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Four equal stages of 40 MB a minibatch, between which little passes."""
    path = tmp_path / "deep.txt"
    path.write_text(write_pipedream(chain([(0.2, 4 * 10**7, 1000), (0.1, 1000, 1000)] * 4)))
    return path


def test_swapping_makes_it_fit(
    deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    command = ["train", "plan-pipeline", str(deep), "--workers", "4", "--bandwidth", "1Gbit/s"]
    command += ["--straight", "--optimizer", "none", "--memory", "90MB"]
    assert main(command) == EXIT_BAD_INPUT
    refused = " ".join(capsys.readouterr().err.split())
    assert "--swap-bandwidth" in refused
    command += ["--swap-bandwidth", "1GB/s", "--json", str(out), "--trace", str(trace)]
    assert main(command) == EXIT_GOOD
    plan, shown = read_pipeline_plan(out), " ".join(capsys.readouterr().out.split())
    assert plan.options.swap_bandwidth == 1e9
    own = 4 * 10**7 + 1000
    assert [stage.swapped_bytes for stage in plan.stages] == [own, own, 0, 0]
    without = max(stage.memory_bytes + stage.spared_bytes for stage in plan.stages)
    assert f"{own / 2**20:.4g} MiB in stage 0, {own / 2**20:.4g} MiB in stage 1, " in shown
    assert f"without swapping {without / 2**20:.4g} MiB" in shown
    assert "bytes swapped" in shown
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"O0.0", "I0.0", "O1.3", "I1.3"} <= names


def test_what_fits_shows_no_swapping(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "plan-pipeline", str(deep), "--workers", "4", "--bandwidth", "1Gbit/s"]
    command += ["--straight", "--optimizer", "none", "--memory", "900MB"]
    assert main(command) == EXIT_GOOD
    plain = capsys.readouterr().out
    assert main([*command, "--swap-bandwidth", "1GB/s"]) == EXIT_GOOD
    assert capsys.readouterr().out == plain
    assert "swap" not in plain


def test_the_fastest_simulated(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All candidates are shown, and none is faster by more than a percent than what is taken."""
    out = tmp_path / "plan.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "4", "--bandwidth", "1Gbit/s"]
    assert main([*command, "--sort-by", "simulated", "--json", str(out)]) == EXIT_GOOD
    plan, shown = read_pipeline_plan(out), capsys.readouterr().out
    assert "3-1, depth 1: 0.200000 s planned" in shown
    assert "4, depth 1:" in shown
    assert plan.simulated_seconds is not None
    least = min(float(line.split()[-3]) for line in shown.splitlines() if "planned, " in line)
    assert plan.simulated_seconds <= least / 0.99


def test_a_pipe_too_long_to_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trace = tmp_path / "long.txt", tmp_path / "trace.json"
    path.write_text(write_pipedream(chain([(1.0, 1, 1)] * 64)))
    command = ["train", "plan-pipeline", str(path), "--workers", "64", "--bandwidth", "1Gbit/s"]
    assert main([*command, "--straight"]) == EXIT_GOOD
    assert "not simulated: " in capsys.readouterr().out
    assert main([*command, "--straight", "--trace", str(trace)]) == EXIT_BAD_INPUT
    assert "no trace: to simulate so many" in " ".join(capsys.readouterr().err.split())
    assert not trace.exists()


@pytest.mark.parametrize("cluster", ["h100-8", "this-machine"])
def test_a_cluster_gives_links_and_memory(small: Path, tmp_path: Path, cluster: str) -> None:
    out = tmp_path / "plan.json"
    command = ["train", "plan-pipeline", str(small), "--workers", "2", "--json", str(out)]
    assert main([*command, "--cluster", cluster]) == EXIT_GOOD
    plan = read_pipeline_plan(out)
    assert plan.num_workers == 2
    assert plan.options.memory_limit_bytes is not None
    assert plan.levels[0].name != "link"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bandwidth", "1Gbit/s", "--memory", "1MB"], "the least that one needs is"),
        (["--bandwidth", "1Gbit/s", "--straight", "--workers", "9"], "need as many stages"),
        (["--bandwidth", "1Gbit/s", "--workers", "2000"], "1 to 1024"),
        (["--cluster", "h100-8", "--workers", "9"], "no link that joins 9"),
        (["--cluster", "nowhere"], "no cluster 'nowhere'"),
        (["--bandwidth", "1Gbit/s", "--json", "/dev/null/plan.json"], "/dev/null"),
    ],
)
def test_refused_with_the_reason(
    small: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["train", "plan-pipeline", str(small), "--workers", "2", *flags]) == EXIT_BAD_INPUT
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("node1\n")
    command = ["train", "plan-pipeline", str(path), "--workers", "2", "--bandwidth", "1Gbit/s"]
    assert main(command) == EXIT_BAD_INPUT
    assert "line 1: 'node1' is no layer" in " ".join(capsys.readouterr().err.split())


def test_the_authors_profile(capsys: pytest.CaptureFixture[str]) -> None:
    profile("vgg16")
    path = PROFILES / "vgg16.graph.txt"
    command = ["train", "plan-pipeline", str(path), "--workers", "8", "--bandwidth", "10Gbit/s"]
    assert main(command) == EXIT_GOOD
    shown = capsys.readouterr().out
    assert ": 7-1" in shown
    assert "0.088874 s a minibatch, 2 in flight; data parallel 0.193701 s: 2.18x" in shown
