"""``elbowroom train plan-swap``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.cli.exit_codes import EXIT_GOOD
from elbowroom.cli.main import main
from elbowroom.cli.plan_swap import print_swap_plan
from elbowroom.cli.screen import Console
from elbowroom.core.step_profile import ReadyGradient, StepProfile, write_step_profile
from elbowroom.core.units import MIB
from elbowroom.planning.swap.choose import plan_swap
from elbowroom.planning.swap.memory import floor_bytes
from elbowroom.planning.swap.reduction import GradientReduction
from elbowroom.planning.swap.timeline import SwapLink, simulate_swap
from elbowroom.plans.swap import read_swap_plan
from tests.planning.swap.made_models import gpt_like, unet_like, with_recipes

SLOW = SwapLink(2e8, 2e8)


def written(profile: StepProfile, folder: Path) -> Path:
    path = folder / "step.json"
    write_step_profile(path, profile)
    return path


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, out = unet_like(), tmp_path / "plan.json"
    flags = ["--budget", "70MiB", "--link", "200MB/s", "--json", str(out)]
    assert main(["train", "plan-swap", str(written(profile, tmp_path)), *flags]) == EXIT_GOOD
    plan = read_swap_plan(out)
    assert plan == plan_swap(profile, 70 * MIB, SLOW)
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines()}
    first = lines["0"].split()
    assert first[1:4] == ["layer0", "16", "MiB"]
    assert "swap" in lines["0"] and ("hidden" in lines["0"] or "waited" in lines["0"])
    assert "keep" in lines["19"]
    assert f"{len(plan.choices)} of 20" in lines["swapped"]
    assert "3 MiB" in lines["static"]
    assert "59 MiB" in lines["floor"]
    assert "137.5 MiB" in lines["keep"]
    slowdown = plan.seconds / plan.compute_seconds - 1
    assert f"{plan.seconds:.6f}, {slowdown:.1%}" in lines["seconds"]
    assert float(lines["thresholds"].split()[1].rstrip(",")) >= round(plan.seconds, 6)


def test_a_duplex_link_is_no_slower(tmp_path: Path) -> None:
    path = str(written(unet_like(), tmp_path))
    seconds = []
    for extra in ([], ["--duplex"]):
        out = tmp_path / "plan.json"
        flags = ["--budget", "60MiB", "--link", "300MB/s", "--json", str(out), *extra]
        assert main(["train", "plan-swap", path, *flags]) == EXIT_GOOD
        seconds.append(read_swap_plan(out).seconds)
    assert seconds[1] <= seconds[0]


def test_the_trace_has_compute_and_copies(tmp_path: Path) -> None:
    path, trace = str(written(unet_like(), tmp_path)), tmp_path / "trace.json"
    assert main(["train", "plan-swap", path, "--budget", "70MiB", "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    curve = [event["args"]["predicted bytes"] for event in events if event["ph"] == "C"]
    assert max(curve) == plan_swap(unet_like(), 70 * MIB).peak_bytes
    assert len(curve) == unet_like().num_ticks + 1
    assert {"tick 3", "O0", "I0"} <= names


def test_a_step_of_several_replicas_is_shown_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = unet_like()
    gradients = (ReadyGradient(made.num_ticks - 9, 30 * MIB), ReadyGradient(made.num_ticks - 1, 9))
    profile, trace = replace(made, gradients=gradients), tmp_path / "trace.json"
    flags = [str(written(profile, tmp_path)), "--budget", "70MiB", "--link", "200MB/s"]
    replicas = ["--replicas", "4", "--network", "1GB/s", "--trace", str(trace)]
    plan = plan_swap(profile, 70 * MIB, SLOW)
    for extra in ([], ["--shared-link"]):
        assert main(["train", "plan-swap", *flags, *replicas, *extra]) == EXIT_GOOD
        shown = capsys.readouterr().out
        lines = {line.split()[0]: line for line in shown.splitlines()}
        reduction = GradientReduction(4, 1e9, shares_link=bool(extra))
        seconds = simulate_swap(profile, plan, SLOW, reduction).seconds
        assert f" {seconds:.6f}, " in lines["all-reduce"]
        assert f" {plan.seconds:.6f}, " in lines["seconds"]
        named = [event.get("args") for event in json.loads(trace.read_text())["traceEvents"]]
        assert {"name": "reduce"} in named
    assert main(["train", "plan-swap", *flags, "--replicas", "4"]) != EXIT_GOOD
    old = [str(written(made, tmp_path)), *flags[1:]]
    assert main(["train", "plan-swap", *old, *replicas]) != EXIT_GOOD


def test_of_many_tensors_the_largest_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(gpt_like(12, 4), tmp_path))
    budget = ["--budget", "1GiB"]
    assert main(["train", "plan-swap", path, *budget]) == EXIT_GOOD
    short = capsys.readouterr().out
    assert "and 22 smaller ones: --all" in short
    assert main(["train", "plan-swap", path, *budget, "--all"]) == EXIT_GOOD
    assert len(capsys.readouterr().out.splitlines()) == len(short.splitlines()) + 21


def test_a_narrow_terminal_has_room() -> None:
    profile = unet_like()
    plan = plan_swap(profile, 62 * MIB, SLOW)
    screen = Console(file=io.StringIO(), width=50, force_terminal=True, no_color=True)
    print_swap_plan(screen, profile, plan, simulate_swap(profile, plan, SLOW))
    assert isinstance(screen.file, io.StringIO)
    shown = re.sub(r"\x1b\[\d*m", "", screen.file.getvalue())
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 50
    assert any(line.endswith("waited") for line in lines)


def test_what_is_made_again_is_shown_and_may_be_forbidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    path = str(written(with_recipes(unet_like(), random.Random(1)), tmp_path))
    flags = ["--budget", "70MiB", "--link", "20MB/s", "--all", "--json", str(out)]
    for extra in ([], ["--no-recompute"]):
        assert main(["train", "plan-swap", path, *flags, *extra]) == EXIT_GOOD
        plan = read_swap_plan(out)
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        does = [number for number in plan.choice_of if " recompute " in lines[str(number)]]
        assert does == [choice.storage for choice in plan.recomputed]
        assert bool(does) == (not extra)
        assert lines["recomputed"].split()[1].rstrip(",") == str(len(does))


def test_a_budget_below_the_floor_is_refused_by_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floor = floor_bytes(unet_like())
    path = str(written(unet_like(), tmp_path))
    assert main(["train", "plan-swap", path, "--budget", f"{floor - 1}"]) != EXIT_GOOD
    shown = capsys.readouterr().err
    assert f"{floor} bytes" in shown and f"{floor - 1} bytes" in shown


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert main(["train", "plan-swap", str(path), "--budget", "1GiB"]) != EXIT_GOOD
