"""Pipelines of real processes give what the paper's rule gives in one, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elbowroom.core.errors import InputError
from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.versions import Semantics
from elbowroom.planning.pipeline.cuts import find_cuts
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.stage_cost import StageCost
from elbowroom.planning.pipeline.weight_versions import VersionRule, forward_versions
from elbowroom.plans.pipeline import Level, PipelineOptions
from elbowroom.plans.pipeline_actions import Backward, Forward, Reduce, Schedule, Update
from elbowroom.plans.pipeline_schedule import Kind
from elbowroom.plans.pipeline_shape import Pipe
from tests.pipeline.cases import BATCH, WIDTH, Case, make_stages
from tests.pipeline.members import Members
from tests.pipeline.serial import Trained, train, train_flushed
from tests.planning.pipeline.pipelines import chain

STRAIGHT = [(1, 1), (1, 1, 1), (1, 1, 1, 1)]
REPLICATED = [(2, 1), (1, 2), (2, 2), (3, 1), (3, 2), (2, 1, 1)]

Run = Callable[[Case, Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """What each worker of a case saw."""
    members = Members()
    yield members.run
    members.end()


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


def _computed(seen: list[dict[str, Any]]) -> list[list[tuple[str, int]]]:
    """What each worker computed, in its order."""
    return [[(kind, i) for kind, i, _ in one["done"]] for one in seen]


def _planned(schedule: Schedule) -> list[list[tuple[str, int]]]:
    names = {Forward: "forward", Backward: "backward", Reduce: "reduce", Update: "update"}
    return [
        [(names[type(a)], a.minibatch) for a in actions if type(a) in names]
        for actions in schedule.actions
    ]


def _planned_bytes(case: Case) -> list[dict[str, int]]:
    """What every worker sends to each other one, by the formulas of plans.

    Over a cut the activations of each minibatch go forward, two tensors here, and the gradient of
    one comes back: none is needed of the other, which comes from the batch. Of m replicas each
    sends its share of m minibatches' sync_bytes with every update.
    """
    pipe = Pipe(case.replicas)
    sent: list[dict[str, int]] = [{} for _ in pipe.stages]

    def send(worker: int, other: int, num_bytes: int) -> None:
        sent[worker][str(other)] = sent[worker].get(str(other), 0) + num_bytes

    number_bytes = getattr(torch, case.dtype).itemsize
    for minibatch in range(case.num_minibatches * case.microbatches):
        is_short = minibatch == case.num_minibatches - 1 and case.semantics != "flush"
        rows = BATCH - 1 if is_short else BATCH // case.microbatches
        for stage in range(pipe.num_stages - 1):
            workers = pipe.worker(stage, minibatch), pipe.worker(stage + 1, minibatch)
            send(*workers, 2 * rows * WIDTH * number_bytes)
            send(*workers[::-1], rows * WIDTH * number_bytes)
    weight_bytes = sum(p.nbytes for p in make_stages(case)[0].parameters())
    cuts = find_cuts(chain([(1.0, 1, weight_bytes)] * pipe.num_stages), 10)
    costs = StageCost(cuts, (Level(2, 1.0),), PipelineOptions(sync="allreduce"))
    for workers in map(pipe.workers, range(pipe.num_stages)):
        m = len(workers)
        if m == 1:
            continue
        of_a_round = 1 if case.semantics == "flush" else m
        num_updates = -(-case.num_minibatches // of_a_round)
        sync_bytes = int(costs.sync_bytes(m, np.array(weight_bytes)))
        for place, worker in enumerate(workers):
            send(worker, workers[(place + 1) % m], num_updates * m * sync_bytes // m)
    return sent


@pytest.mark.parametrize("replicas", [*STRAIGHT, *REPLICATED], ids=str)
@pytest.mark.parametrize("semantics", ["stash", "predict", "vertical-sync"])
def test_delayed_weights(
    run: Run, tmp_path: Path, replicas: tuple[int, ...], semantics: str
) -> None:
    optimizer = "adamw" if sum(replicas) % 2 else "sgd"
    dtype = "float32" if semantics == "vertical-sync" else "float64"
    check_delayed_weights(run, Case(replicas, semantics, optimizer, dtype, dropout=0.3), tmp_path)


@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("semantics", ["stash", "predict", "vertical-sync"])
def test_delayed_weights_at_depth_2(
    run: Run, tmp_path: Path, replicas: tuple[int, ...], semantics: str
) -> None:
    case = Case(replicas, semantics, num_minibatches=13, dropout=0.3, depth=2)
    check_delayed_weights(run, case, tmp_path)


def check_delayed_weights(run: Run, case: Case, folder: Path) -> None:
    seen = run(case, folder)
    assert _same_as_serial(case, folder, seen, train(case))
    schedule = plan_schedule(case.replicas, case.num_minibatches, depth=case.depth)
    assert _computed(seen) == _planned(schedule)
    used = {
        Forward(schedule.stages[worker], i): version
        for worker, one in enumerate(seen)
        for kind, i, version in one["done"]
        if kind == "forward"
    }
    rule: VersionRule = "vertical-sync" if case.semantics == "vertical-sync" else "stash"
    assert used == forward_versions(schedule, rule)
    assert [one["sent_bytes"] for one in seen] == _planned_bytes(case)


@pytest.mark.parametrize("kind", ["1f1b-flush", "gpipe"])
@pytest.mark.parametrize("replicas", STRAIGHT, ids=str)
def test_flush_is_gradient_accumulation(
    run: Run, tmp_path: Path, replicas: tuple[int, ...], kind: Kind
) -> None:
    case = Case(replicas, "flush", "adamw", num_minibatches=5, microbatches=4, dropout=0.3)
    case = replace(case, schedule=kind)
    seen = run(case, tmp_path)
    assert _same_as_serial(case, tmp_path, seen, train_flushed(case))
    schedule = plan_schedule(replicas, 5 * 4, kind, 4)
    assert _computed(seen) == _planned(schedule)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 3)], ids=str)
def test_flush_with_replicas(run: Run, tmp_path: Path, replicas: tuple[int, ...]) -> None:
    """The same sums in another order: each replica first adds up its own microbatches."""
    case = Case(replicas, "flush", num_minibatches=5, microbatches=4, dropout=0.3, clip_norm=0.3)
    seen = run(case, tmp_path)
    assert [one["sent_bytes"] for one in seen] == _planned_bytes(case)
    stages = train_flushed(case).stages
    for worker, stage in enumerate(stages[k] for k in Pipe(replicas).stages):
        weights = load_file(tmp_path / f"{worker}.safetensors")
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_naive_weights_differ(run: Run, tmp_path: Path) -> None:
    case = Case((1, 1, 1), "naive")
    seen = run(case, tmp_path)
    assert not _same_as_serial(case, tmp_path, seen, train(case))


@pytest.mark.parametrize("semantics", ["stash", "predict", "vertical-sync"])
@pytest.mark.parametrize(("num_stages", "depth"), [(2, 1), (3, 1), (4, 1), (3, 2)])
def test_versions_used_and_held(
    run: Run, tmp_path: Path, num_stages: int, depth: int, semantics: str
) -> None:
    """Stage k of n uses version max(0, i - (n-1-k)) and holds n-k at most (papers, section 2).

    With vertical sync all do as the first. Predicted weights lie beside those that are updated.
    """
    n, case = num_stages, Case((1,) * num_stages, semantics, depth=depth)
    for k, seen in enumerate(run(case, tmp_path)):
        late = depth * (n - 1 - (0 if semantics == "vertical-sync" else k))
        for kind in ("forward", "backward"):
            used = [version for name, _, version in seen["done"] if name == kind]
            assert used == [max(0, i - late) for i in range(case.num_minibatches)]
        assert seen["most_held"] == late + 1 + (semantics == "predict" and late > 0)


def test_bytes_between_stages(run: Run, tmp_path: Path) -> None:
    """Nothing comes back to a stage that learns nothing."""
    case = Case((1, 1, 1), "stash", frozen=1)
    seen = run(case, tmp_path)
    rows = 4 * (case.num_minibatches - 1) + 3
    back = rows * 6 * 8  # 6 columns in float64
    sent = [one["sent_bytes"] for one in seen]
    assert sent == [{"1": 2 * back}, {"2": 2 * back, "0": 0}, {"1": back}]
    assert _same_as_serial(case, tmp_path, seen, train(case))


@pytest.mark.parametrize("semantics", ["stash", "predict", "vertical-sync"])
@pytest.mark.parametrize("replicas", [(1, 1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
def test_drained_between(
    run: Run, tmp_path: Path, replicas: tuple[int, ...], semantics: str
) -> None:
    """After a drain nothing is on its way, also where it cuts a round short.

    A sum of two has no order, so that any buckets will do.
    """
    buckets = {} if max(replicas) > 2 else {"bucket_bytes": 1}
    case = Case(replicas, semantics, breaks=(3, 8), **buckets)
    assert _same_as_serial(case, tmp_path, run(case, tmp_path), train(case))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1), "stash", clip_norm=0.3),
        Case((3, 1), "vertical-sync", clip_norm=0.3),
        Case((1, 1, 1), "flush", microbatches=2, num_minibatches=5, clip_norm=0.3),
    ],
    ids=lambda case: case.semantics,
)
def test_clipped(run: Run, tmp_path: Path, case: Case) -> None:
    seen = run(case, tmp_path)
    serial = train_flushed if case.semantics == "flush" else train
    assert _same_as_serial(case, tmp_path, seen, serial(case))
    assert not _same_as_serial(case, tmp_path, seen, serial(replace(case, clip_norm=None)))


def test_autocast(run: Run, tmp_path: Path) -> None:
    """Each version of the weights is cast anew."""
    case = Case((1, 1), "stash", dtype="float32", dropout=0.3, autocast=True)
    seen = run(case, tmp_path)
    assert _same_as_serial(case, tmp_path, seen, train(case))
    assert not _same_as_serial(case, tmp_path, seen, train(replace(case, autocast=False)))


@pytest.mark.parametrize("limits", [{"clip_norm": 0.0}, {"bucket_bytes": 0}], ids=str)
def test_limits_of_nothing(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give more than 0"):
        StageOptions(**limits)


def test_microbatches_without_a_flush() -> None:
    with pytest.raises(InputError, match="4 microbatches with semantics 'stash'"):
        StageOptions("stash", 4)
    with pytest.raises(InputError, match="4 microbatches with semantics of the plan"):
        StageOptions(microbatches=4)


@pytest.mark.parametrize(
    ("semantics", "schedule"), [("flush", "1f1b"), ("stash", "gpipe"), (None, "1f1b-flush")]
)
def test_schedules_of_other_semantics(semantics: Semantics | None, schedule: Kind) -> None:
    with pytest.raises(InputError, match=f"schedule '{schedule}' with semantics"):
        StageOptions(semantics, schedule=schedule)


def test_stages_are_different() -> None:
    """The comparisons above would not notice a swap of equal stages."""
    weights = [stage.get_parameter("linear.weight") for stage in make_stages(Case((1, 1), "stash"))]
    assert not torch.equal(*weights)
