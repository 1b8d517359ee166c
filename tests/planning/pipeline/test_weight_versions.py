"""Versions of weights, read off schedules: the paper's formulas, and a naive count."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import ScheduleError
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.schedule_check import check_schedule
from elbowroom.planning.pipeline.weight_versions import (
    VERSION_RULES,
    Held,
    VersionRule,
    forward_versions,
    held_over_time,
)
from elbowroom.plans.pipeline_actions import Backward, Forward, Schedule, Update
from elbowroom.plans.pipeline_schedule import ActionStream, Kind, ScheduleRule
from tests.planning.pipeline.schedules import REPLICAS, schedules

DEPTHS = st.integers(1, 3)


@given(st.integers(1, 6), st.integers(1, 20), DEPTHS)
def test_straight_with_stashes(num_stages: int, num_minibatches: int, depth: int) -> None:
    schedule = plan_schedule((1,) * num_stages, num_minibatches, depth=depth)
    versions = forward_versions(schedule)
    for k in range(num_stages):
        for i in range(num_minibatches):
            assert versions[Forward(k, i)] == max(0, i - depth * (num_stages - 1 - k))


@given(st.integers(1, 6), st.integers(1, 20), DEPTHS)
def test_straight_with_vertical_sync(num_stages: int, num_minibatches: int, depth: int) -> None:
    schedule = plan_schedule((1,) * num_stages, num_minibatches, depth=depth)
    versions = forward_versions(schedule, "vertical-sync")
    for forward, version in versions.items():
        assert version == max(0, forward.minibatch - depth * (num_stages - 1))


@given(REPLICAS, st.integers(1, 20), DEPTHS)
def test_streams_name_the_versions_of_vertical_sync(
    replicas: tuple[int, ...], num_minibatches: int, depth: int
) -> None:
    """A worker of a stage names, minibatch by minibatch, what can be read off all lists."""
    schedule = plan_schedule(replicas, num_minibatches, depth=depth)
    for forward, version in forward_versions(schedule, "vertical-sync").items():
        worker = schedule.worker(forward.stage, forward.minibatch)
        stream = ActionStream(schedule, worker, ScheduleRule(depth=depth))
        assert stream.input_version(forward.minibatch) == version


@given(st.integers(1, 6), DEPTHS)
def test_versions_held_in_a_straight_pipe(num_stages: int, depth: int) -> None:
    schedule = plan_schedule((1,) * num_stages, 4 * depth * num_stages, depth=depth)
    at_input = depth * (num_stages - 1) + 1
    for k in range(num_stages):
        held = depth * (num_stages - 1 - k) + 1
        assert most(schedule, k, "stash") == Held(held, held)
        assert most(schedule, k, "vertical-sync") == Held(held, at_input)
        assert most(schedule, k, "naive") == Held(held, 1)


def most(schedule: Schedule, worker: int, rule: VersionRule) -> Held:
    held = held_over_time(schedule, worker, rule)
    return Held(max(x.in_flight for x in held), max(x.versions for x in held))


@given(REPLICAS, DEPTHS)
def test_depth_is_what_plans_count_on(replicas: tuple[int, ...], depth: int) -> None:
    schedule = plan_schedule(replicas, 8 * depth * sum(replicas), depth=depth)
    for worker, stage in enumerate(schedule.stages):
        held = 1 + depth * ceil(sum(replicas[stage + 1 :]) / replicas[stage])
        assert most(schedule, worker, "stash") == Held(held, held)


@given(REPLICAS, st.integers(1, 30))
def test_replicas_share_versions(replicas: tuple[int, ...], num_minibatches: int) -> None:
    """Minibatches of one round are trained with one version, whichever replica has them."""
    versions = forward_versions(plan_schedule(replicas, num_minibatches))
    for forward, version in versions.items():
        count = replicas[forward.stage]
        assert version == versions[Forward(forward.stage, forward.minibatch // count * count)]


@given(REPLICAS, st.integers(1, 30))
def test_vertical_sync_counts_no_minibatch_that_the_input_stage_does_not(
    replicas: tuple[int, ...], num_minibatches: int
) -> None:
    schedule = plan_schedule(replicas, num_minibatches)
    newest, synced = forward_versions(schedule), forward_versions(schedule, "vertical-sync")
    for forward, version in synced.items():
        stage, at_input = forward.stage, newest[Forward(0, forward.minibatch)]
        counted = min(at_input * replicas[0], num_minibatches)
        assert version <= newest[forward]
        assert min(version * replicas[stage], num_minibatches) <= counted
        if version < newest[forward]:
            assert min((version + 1) * replicas[stage], num_minibatches) > counted


@given(st.sampled_from(["gpipe", "1f1b-flush"]), REPLICAS, st.integers(1, 20), st.integers(1, 6))
def test_flushed_schedules_have_one_version(
    kind: Kind, replicas: tuple[int, ...], num_minibatches: int, flush_every: int
) -> None:
    schedule = plan_schedule(replicas, num_minibatches, kind, flush_every)
    for rule in VERSION_RULES:
        for forward, version in forward_versions(schedule, rule).items():
            assert version == forward.minibatch // flush_every
        for worker in range(schedule.num_workers):
            assert all(x.versions == 1 for x in held_over_time(schedule, worker, rule))


@given(schedules(), st.sampled_from(["stash", "vertical-sync"]))
def test_what_is_held_against_a_naive_count(schedule: Schedule, rule: VersionRule) -> None:
    used = forward_versions(schedule, rule)
    for worker, actions in enumerate(schedule.actions):
        for place, held in enumerate(held_over_time(schedule, worker, rule)):
            done, left = actions[: place + 1], actions[place + 1 :]
            newest = sum(isinstance(action, Update) for action in done)
            begun = {action.minibatch for action in done if isinstance(action, Forward)}
            ended = {action.minibatch for action in done if isinstance(action, Backward)}
            needed = {
                used[Forward(action.stage, action.minibatch)]
                for action in left
                if isinstance(action, Backward)
            }
            versions = {newest} | {version for version in needed if version <= newest}
            assert held == Held(len(begun - ended), len(versions))


def test_vertical_sync_needs_updates_in_time() -> None:
    """Valid, but stage 1 makes the first update only after the forward that asks for it."""
    schedule = Schedule.parse(
        "1-1 x 3\n"
        "F0.0 SA0.0>1 F0.1 SA0.1>1 RG0.0<1 B0.0 U0.0 F0.2 SA0.2>1 RG0.1<1 B0.1 U0.1 RG0.2<1 B0.2 "
        "U0.2\n"
        "RA1.0<0 F1.0 B1.0 SG1.0>0 RA1.1<0 F1.1 RA1.2<0 F1.2 U1.0 B1.1 SG1.1>0 U1.1 B1.2 SG1.2>0 "
        "U1.2"
    )
    check_schedule(schedule)
    assert forward_versions(schedule)[Forward(1, 2)] == 0
    with pytest.raises(
        ScheduleError, match=r"^F1\.2: vertical sync needs version 1, the stage has 0"
    ):
        forward_versions(schedule, "vertical-sync")
