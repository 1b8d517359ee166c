"""What the schedules look like: order, depth, rounds. That they are valid is tested elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.plans.pipeline_actions import Backward, Forward, Reduce, Schedule, Update
from elbowroom.plans.pipeline_schedule import Kind
from elbowroom.plans.pipeline_shape import Pipe
from tests.planning.pipeline.schedules import REPLICAS, schedules


def computed(schedule: Schedule, worker: int) -> str:
    """Without the transfers."""
    kinds = (Forward, Backward, Reduce, Update)
    actions = (action for action in schedule.actions[worker] if isinstance(action, kinds))
    return " ".join(str(action).replace(f"{action.stage}.", "") for action in actions)


def test_straight() -> None:
    schedule = plan_schedule((1, 1), 4)
    assert computed(schedule, 0) == "F0 F1 B0 U0 F2 B1 U1 F3 B2 U2 B3 U3"
    assert computed(schedule, 1) == "F0 B0 U0 F1 B1 U1 F2 B2 U2 F3 B3 U3"
    assert str(schedule).splitlines()[2].startswith("RA1.0<0 F1.0 B1.0 SG1.0>0 U1.0 RA1.1<0")


def test_uneven_replicas_and_a_last_round_of_one() -> None:
    """Replicas without a minibatch in the last round enter its reduce all the same."""
    schedule = plan_schedule((3, 2), 7)
    assert computed(schedule, 0) == "F0 F3 B0 M2 U2 F6 B3 M5 U5 B6 M6 U6"
    assert computed(schedule, 2) == "F2 F5 B2 M2 U2 B5 M5 U5 M6 U6"
    assert computed(schedule, 3) == "F0 B0 M1 U1 F2 B2 M3 U3 F4 B4 M5 U5 F6 B6 M6 U6"
    assert computed(schedule, 4) == "F1 B1 M1 U1 F3 B3 M3 U3 F5 B5 M5 U5 M6 U6"


def test_flushed() -> None:
    schedule = plan_schedule((1, 1), 5, "gpipe", 3)
    assert computed(schedule, 0) == "F0 F1 F2 B0 B1 B2 U2 F3 F4 B3 B4 U4"
    schedule = plan_schedule((1, 1), 5, "1f1b-flush", 3)
    assert computed(schedule, 0) == "F0 F1 B0 F2 B1 B2 U2 F3 F4 B3 B4 U4"
    assert computed(schedule, 1) == "F0 B0 F1 B1 F2 B2 U2 F3 B3 F4 B4 U4"


@given(schedules())
def test_minibatches_go_round(schedule: Schedule) -> None:
    for worker, actions in enumerate(schedule.actions):
        replicas = schedule.workers(schedule.stages[worker])
        for action in actions:
            if isinstance(action, Forward | Backward):
                assert replicas[action.minibatch % len(replicas)] == worker


@given(REPLICAS, st.integers(1, 30), st.integers(1, 3))
def test_one_forward_one_backward(
    replicas: tuple[int, ...], num_minibatches: int, depth: int
) -> None:
    schedule = plan_schedule(replicas, num_minibatches, depth=depth)
    before = 0
    for stage, count in enumerate(replicas):
        warmup = depth * ((sum(replicas) - 1 - before) // count)
        before += count
        for worker in schedule.workers(stage):
            kinds = "".join(x for x in computed(schedule, worker) if x in "FB")
            own = kinds.count("F")
            first = min(warmup, own)
            assert kinds == "F" * first + "FB" * (own - first) + "B" * first


@given(REPLICAS, st.integers(1, 30))
def test_updates_come_in_rounds(replicas: tuple[int, ...], num_minibatches: int) -> None:
    schedule = plan_schedule(replicas, num_minibatches)
    for worker, actions in enumerate(schedule.actions):
        count = replicas[schedule.stages[worker]]
        updates = [action.minibatch for action in actions if isinstance(action, Update)]
        reduces = [action.minibatch for action in actions if isinstance(action, Reduce)]
        rounds = -(-num_minibatches // count)
        ends = [min((number + 1) * count, num_minibatches) - 1 for number in range(rounds)]
        assert updates == ends
        assert reduces == (ends if count > 1 else [])


def test_warmup() -> None:
    assert [Pipe((1, 1, 1, 1)).warmup_forwards(stage) for stage in range(4)] == [3, 2, 1, 0]
    assert [Pipe((15, 1)).warmup_forwards(stage) for stage in range(2)] == [1, 0]
    assert [Pipe((2, 3, 1)).warmup_forwards(stage) for stage in range(3)] == [2, 1, 0]
    assert [Pipe((2, 3, 1)).warmup_forwards(stage, 2) for stage in range(3)] == [4, 2, 0]
    assert [Pipe((2, 3)).warmup_forwards(stage, 3) for stage in range(2)] == [6, 0]


def test_refuses_depth() -> None:
    with pytest.raises(InputError, match="of depth 0"):
        plan_schedule((1,), 4, depth=0)
    with pytest.raises(InputError, match="'gpipe' of depth 2"):
        plan_schedule((1,), 4, "gpipe", 2, depth=2)


@pytest.mark.parametrize(
    ("replicas", "num_minibatches", "kind", "flush_every", "problem"),
    [
        ((), 1, "1f1b", None, "at least one"),
        ((2, 0), 1, "1f1b", None, "at least one"),
        ((1,), 0, "1f1b", None, "at least 1"),
        ((1,), 4, "1f1b", 2, "has no flush"),
        ((1,), 4, "gpipe", None, "need it"),
        ((1,), 4, "1f1b-flush", 0, "after 0 minibatches"),
        ((1,), 4, "zigzag", None, "not one of 1f1b, gpipe, 1f1b-flush"),
    ],
)
def test_refuses(
    replicas: tuple[int, ...],
    num_minibatches: int,
    kind: Kind,
    flush_every: int | None,
    problem: str,
) -> None:
    with pytest.raises(InputError, match=problem):
        plan_schedule(replicas, num_minibatches, kind, flush_every)
