"""Pipelines of real processes give what the paper's rule gives in one, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elbowroom.core.errors import InputError
from elbowroom.core.pipeline_action import Backward, Forward, Schedule
from elbowroom.pipeline.worker import StageOptions
from elbowroom.planning.schedule import plan_schedule
from elbowroom.planning.weight_versions import VersionRule, forward_versions
from tests.pipeline.cases import Case, make_stages
from tests.pipeline.serial import Trained, train, train_flushed

STRAIGHT = [(1, 1), (1, 1, 1), (1, 1, 1, 1)]
REPLICATED = [(2, 1), (1, 2), (2, 2), (2, 1, 1)]


def _run(case: Case, folder: Path) -> list[dict[str, Any]]:
    """What every worker saw."""
    command = (sys.executable, "-m", "tests.pipeline.member", case.to_json(), str(folder))
    members = [subprocess.Popen([*command, str(n)]) for n in range(sum(case.replicas))]
    try:
        for member in members:
            assert member.wait(60) == 0
    finally:
        for member in members:
            member.kill()
            member.wait()
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(len(members))]


def _same_as_serial(case: Case, folder: Path, seen: list[dict[str, Any]], serial: Trained) -> bool:
    """Weights of every worker; losses too, those of each minibatch where it was run."""
    for index in range(case.num_minibatches):
        here = [one["losses"][index] for one in seen if one["losses"][index] is not None]
        if here != [serial.losses[index]]:
            return False
    stages = [k for k, count in enumerate(case.replicas) for _ in range(count)]
    return all(
        torch.equal(tensor, dict(serial.stages[k].named_parameters())[name].detach())
        for worker, k in enumerate(stages)
        for name, tensor in load_file(folder / f"{worker}.safetensors").items()
    )


def _passes(seen: list[dict[str, Any]]) -> list[list[tuple[str, int]]]:
    """What each worker computed, in its order."""
    return [[(kind, i) for kind, i, _ in one["done"] if kind != "update"] for one in seen]


def _planned_passes(schedule: Schedule) -> list[list[tuple[str, int]]]:
    names = {Forward: "forward", Backward: "backward"}
    return [
        [(names[type(a)], a.minibatch) for a in actions if isinstance(a, Forward | Backward)]
        for actions in schedule.actions
    ]


@pytest.mark.parametrize("replicas", [*STRAIGHT, *REPLICATED], ids=str)
@pytest.mark.parametrize("semantics", ["stash", "vertical-sync"])
def test_delayed_weights(tmp_path: Path, replicas: tuple[int, ...], semantics: str) -> None:
    optimizer = "adamw" if sum(replicas) % 2 else "sgd"
    dtype = "float64" if semantics == "stash" else "float32"
    check_delayed_weights(Case(replicas, semantics, optimizer, dtype, dropout=0.3), tmp_path)


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("semantics", ["stash", "vertical-sync"])
def test_delayed_weights_at_depth_2(
    tmp_path: Path, replicas: tuple[int, ...], semantics: str
) -> None:
    case = Case(replicas, semantics, num_minibatches=13, dropout=0.3, depth=2)
    check_delayed_weights(case, tmp_path)


def check_delayed_weights(case: Case, folder: Path) -> None:
    seen = _run(case, folder)
    assert _same_as_serial(case, folder, seen, train(case))
    schedule = plan_schedule(case.replicas, case.num_minibatches, depth=case.depth)
    assert _passes(seen) == _planned_passes(schedule)
    used = {
        Forward(schedule.stages[worker], i): version
        for worker, one in enumerate(seen)
        for kind, i, version in one["done"]
        if kind == "forward"
    }
    rule: VersionRule = "stash" if case.semantics == "stash" else "vertical-sync"
    assert used == forward_versions(schedule, rule)


@pytest.mark.parametrize("replicas", STRAIGHT, ids=str)
def test_flush_is_gradient_accumulation(tmp_path: Path, replicas: tuple[int, ...]) -> None:
    case = Case(replicas, "flush", "adamw", num_minibatches=5, microbatches=4, dropout=0.3)
    seen = _run(case, tmp_path)
    assert _same_as_serial(case, tmp_path, seen, train_flushed(case))
    schedule = plan_schedule(replicas, 5 * 4, "1f1b-flush", 4)
    assert _passes(seen) == _planned_passes(schedule)


def test_flush_with_replicas(tmp_path: Path) -> None:
    """The same sums in another order: the first replica adds up every other microbatch."""
    case = Case((2, 1), "flush", "adamw", num_minibatches=5, microbatches=4, dropout=0.3)
    _run(case, tmp_path)
    stages = train_flushed(case).stages
    for worker, stage in enumerate((stages[0], stages[0], stages[1])):
        weights = load_file(tmp_path / f"{worker}.safetensors")
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_naive_weights_differ(tmp_path: Path) -> None:
    case = Case((1, 1, 1), "naive")
    seen = _run(case, tmp_path)
    assert not _same_as_serial(case, tmp_path, seen, train(case))


@pytest.mark.parametrize(("num_stages", "depth"), [(2, 1), (3, 1), (4, 1), (3, 2)])
def test_versions_used_and_held(tmp_path: Path, num_stages: int, depth: int) -> None:
    """Stage k of n uses version max(0, i - (n-1-k)) and holds n-k at most (papers, section 2)."""
    n, case = num_stages, Case((1,) * num_stages, "stash", depth=depth)
    for k, seen in enumerate(_run(case, tmp_path)):
        late = depth * (n - 1 - k)
        for kind in ("forward", "backward"):
            used = [version for name, _, version in seen["done"] if name == kind]
            assert used == [max(0, i - late) for i in range(case.num_minibatches)]
        assert seen["most_held"] == late + 1


def test_bytes_between_stages(tmp_path: Path) -> None:
    """Twice what crosses the cut: activations one way, gradients of them the other."""
    case = Case((1, 1, 1), "stash")
    rows = 4 * (case.num_minibatches - 1) + 3
    crossing = rows * 2 * 6 * 8  # two tensors of 6 columns in float64
    sent = [one["sent_bytes"] for one in _run(case, tmp_path)]
    assert sent == [{"1": crossing}, {"2": crossing, "0": crossing}, {"1": crossing}]


@pytest.mark.parametrize("semantics", ["stash", "vertical-sync"])
@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (1, 2)], ids=str)
def test_drained_between(tmp_path: Path, replicas: tuple[int, ...], semantics: str) -> None:
    """After a drain nothing is on its way, also where it cuts a round short."""
    case = Case(replicas, semantics, breaks=(3, 8))
    assert _same_as_serial(case, tmp_path, _run(case, tmp_path), train(case))


def test_microbatches_without_a_flush() -> None:
    with pytest.raises(InputError, match="4 microbatches with semantics 'stash'"):
        StageOptions("stash", 4)


def test_stages_are_different() -> None:
    """The comparisons above would not notice a swap of equal stages."""
    weights = [stage.get_parameter("linear.weight") for stage in make_stages(Case((1, 1), "stash"))]
    assert not torch.equal(*weights)
