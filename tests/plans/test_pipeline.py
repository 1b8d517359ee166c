"""Pipeline plans: the JSON round trip, what is derived, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline import (
    DataParallel,
    Level,
    LevelTraffic,
    PipelineOptions,
    PipelinePlan,
    StagePlan,
    read_pipeline_plan,
)

FRONT = StagePlan(("a", "b"), (3,), 3, 0.5, 0.25, 2, 1, 100, 40, 90, 10)
BACK = StagePlan(("c",), (1,), 1, 0.4, 0.0, 1, 0, 50, 60, 0, 0)
PLAN = PipelinePlan(
    stages=(FRONT, BACK),
    levels=(Level(4, 1.25e9, "Ethernet"),),
    options=PipelineOptions("allreduce", "sum", 10**9, fewer_workers=True),
    seconds=0.5,
    traffic=(LevelTraffic("Ethernet", 100, 400),),
    data_parallel=DataParallel(1.0, 200),
    num_cuts=4,
    is_exact=True,
)


@pytest.mark.parametrize("simulated", [None, 0.625])
def test_a_plan_survives_json(simulated: float | None) -> None:
    plan = replace(PLAN, simulated_seconds=simulated)
    assert PipelinePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_older_plans_are_read() -> None:
    data = PLAN.to_json()
    del data["simulated_seconds"], data["options"]["depth"]
    assert PipelinePlan.from_json(data) == PLAN
    assert PLAN.options.depth == 1


SWAPS = replace(FRONT, in_flight=5, memory_bytes=5 * (40 + 10) - 3 * 6 + 7, fixed_bytes=7)
SWAPS = replace(SWAPS, swapped_bytes=6)


def test_a_stage_that_swaps() -> None:
    assert (SWAPS.kept_bytes, SWAPS.spared_bytes) == (10, 3 * 6)
    assert (FRONT.kept_bytes, FRONT.spared_bytes) == (10, 0)
    plan = replace(PLAN, stages=(SWAPS, BACK), options=PipelineOptions(swap_bandwidth=1.5e9))
    data = json.loads(json.dumps(plan.to_json()))
    assert PipelinePlan.from_json(data) == plan
    del data["options"]["swap_bandwidth"]
    for stage in data["stages"]:
        del stage["swapped_bytes"]
    before = PipelinePlan.from_json(data)
    assert before.options.swap_bandwidth is None
    assert [stage.swapped_bytes for stage in before.stages] == [0, 0]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (FRONT, {"swapped_bytes": 1}),
        (SWAPS, {"swapped_bytes": -1}),
        (SWAPS, {"swapped_bytes": 17}),
    ],
)
def test_swapping_that_cannot_be(stage: StagePlan, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(stage, **changes)


def test_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match="cannot read the plan"):
        read_pipeline_plan(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot read the plan"):
        read_pipeline_plan(path)
    path.write_text(json.dumps(PLAN.to_json()))
    assert read_pipeline_plan(path) == PLAN


def test_what_is_derived() -> None:
    assert str(PLAN) == "3-1"
    assert (PLAN.num_workers, PLAN.noam, PLAN.speedup) == (4, 2, 2.0)
    assert PLAN.traffic[0].saved == 0.75
    assert LevelTraffic("none", 0, 0).saved == 0.0
    assert str(PLAN.levels[0]) == "4 x 10 Gbit/s"
    assert (PLAN.options.sync_factor, PipelineOptions().sync_factor) == (2, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "must be 'elbowroom pipeline plan'"),
        ({"version": 9}, "version 9"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{}]}, "no pipeline plan: 'layers'"),
        ({"colour": "red"}, "colour"),
        ({"levels": [{"num_units": 0, "bandwidth": 1.0}]}, "a level of 0 units"),
        ({"options": {"sync": "gossip"}}, "sync 'gossip' is not one of ps, allreduce"),
    ],
)
def test_what_is_no_plan(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PipelinePlan.from_json({**PLAN.to_json(), **change})


@pytest.mark.parametrize("data", [[], None, "plan"])
def test_what_is_no_object(data: Any) -> None:
    with pytest.raises(InputError, match="no pipeline plan"):
        PipelinePlan.from_json(data)


def test_impossible_values() -> None:
    for bandwidth in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="bandwidth above 0"):
            Level(2, bandwidth)
    with pytest.raises(InputError, match="holds nothing"):
        PipelineOptions(memory_limit_bytes=0)
    for bandwidth in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="bandwidth above 0"):
            PipelineOptions(swap_bandwidth=bandwidth)
    with pytest.raises(InputError, match="overlap 'half'"):
        PipelineOptions(overlap="half")  # type: ignore[arg-type]
