"""Stages that swap what minibatches in flight have saved: bitwise as plain, in less memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from elbowroom.planning.pipeline.plan import plan_on_levels
from tests.pipeline.members import Members
from tests.pipeline.memory_cases import Case
from tests.pipeline.test_memory import make_plan, measure, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    members = Members("tests.pipeline.memory_member")
    yield members
    members.end()


@pytest.mark.parametrize(
    "case",
    [
        Case("conv", (1, 1, 1), "momentum"),
        Case("blocks", (1, 1, 1), "momentum", "predict"),
        Case("blocks", (1, 1), "adamw", "flush", microbatches=4),
    ],
    ids=lambda case: f"{case.model}-{case.semantics}",
)
def test_swapped_stages_train_the_same_weights(
    case: Case, members: Members, tmp_path: Path
) -> None:
    graph = measure(case)
    plan = make_plan(case, graph)
    seen = []
    for name, one in (("plain", case), ("swapped", replace(case, swaps=True))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps(plan.to_json()))
        seen.append(members.run(one, folder))
    plain, swapped = seen
    for number, (one, other) in enumerate(zip(plain, swapped, strict=True)):
        assert one["weights"] == other["weights"], number
        assert one["moved"] == [0, 0] and other["moved"][0] > 0
        if plan.stages[number].in_flight > 2:
            assert other["peak"] < one["peak"]


def test_a_plan_that_swaps_says_what_its_workers_hold(members: Members, tmp_path: Path) -> None:
    """Where the limit of a worker's memory is below what it would hold without."""
    case = Case("conv", (1, 1, 1), "momentum")
    graph = measure(case)
    without = make_plan(case, graph)
    limit = max(stage.memory_bytes for stage in without.stages) - 1
    options = replace(without.options, memory_limit_bytes=limit, swap_bandwidth=1e12)
    plan = plan_on_levels(graph, without.levels, options)
    assert plan.stages[0].swapped_bytes
    held = run(members, case, plan, tmp_path)
    assert held == [pytest.approx(stage.memory_bytes, rel=0.05) for stage in plan.stages]
