"""Where workers stand, on topologies of one, two and three levels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.planning.pipeline.placement import place_workers
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level
from tests.planning.pipeline.pipelines import chain


def levels_of(*sizes: int) -> tuple[Level, ...]:
    return tuple(Level(size, 1e9) for size in sizes)


def test_one_level() -> None:
    placement = place_workers(levels_of(6), [(3,), (1,), (2,)])
    assert placement.slots == (0, 1, 2, 3, 4, 5)
    assert placement.level_between(0, 5) == 0


def test_a_straight_pipe_in_each_of_two_nodes() -> None:
    """Each stage has a replica in both nodes of 2 workers; minibatches stay in a node."""
    placement = place_workers(levels_of(2, 2), [(2, 1), (2, 1)])
    assert placement.slots == (0, 2, 1, 3)
    assert placement.level_between(0, 2) == 0, "from stage to stage"
    assert placement.level_between(0, 1) == 1, "replicas of a stage"
    assert [placement.unit(worker, 1) for worker in range(4)] == [0, 1, 0, 1]


def test_a_stage_in_each_of_two_nodes() -> None:
    placement = place_workers(levels_of(2, 2), [(1, 2), (1, 2)])
    assert placement.slots == (0, 1, 2, 3)
    assert placement.level_between(0, 1) == 0, "replicas of a stage"
    assert placement.level_between(1, 2) == 1, "from stage to stage"


def test_three_replicas_of_three_and_one() -> None:
    """Nodes of 4: the first two hold 3-1 each, the third a stage of 4."""
    placement = place_workers(levels_of(4, 3), [(2, 3), (2, 1), (1, 4)])
    assert placement.slots == (0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=8, max_size=10),
)
def test_plans_place_each_worker_once(sizes: list[int], seconds: list[int]) -> None:
    layers = chain([(float(number), number, number) for number in seconds])
    plan = plan_on_levels(layers, levels_of(*sizes))
    placement = place_workers(plan.levels, [stage.level_replicas for stage in plan.stages])
    assert sorted(placement.slots) == list(range(plan.num_workers))


@pytest.mark.parametrize(
    ("level_replicas", "problem"),
    [
        ([(1,)], "have not 2 levels"),
        ([(1, 3)], "overfills a unit"),
        ([(1, 1), (1, 2)], "overfills a unit"),
        ([(1, 2), (1, 1)], "leave units"),
    ],
)
def test_refuses(level_replicas: list[tuple[int, ...]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        place_workers(levels_of(2, 2), level_replicas)
