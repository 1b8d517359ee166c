"""The simulator's own laws, on arbitrary tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.planning.events import Task, critical_path_seconds, fair_rates, simulate
from tests.examples import examples

NUM_RESOURCES = 4
PARTS = st.floats(0.05, 1.0)


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 25))):
        resources = draw(st.sets(st.integers(0, NUM_RESOURCES - 1), max_size=3))
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        tasks.append(
            Task(
                name=f"t{number}",
                stream=draw(st.none() | st.integers(0, 3)),
                seconds=draw(st.floats(0, 10)),
                uses=tuple((resource, draw(PARTS)) for resource in sorted(resources)),
                after=tuple(sorted(after)),
                latency=draw(st.sampled_from([0.0, 0.5])),
            )
        )
    return tasks


@examples(300)
@given(task_lists())
def test_laws(tasks: list[Task]) -> None:
    timeline = simulate(tasks, NUM_RESOURCES)
    slack = 1e-6 * (1 + timeline.seconds)
    last: dict[int, float] = {}
    for number, task in enumerate(tasks):
        start, end = timeline.starts[number], timeline.ends[number]
        assert end - start >= task.latency + task.seconds - slack, "nothing is faster than alone"
        assert all(timeline.ends[before] <= start + slack for before in task.after)
        if task.stream is not None:
            assert last.get(task.stream, 0.0) <= start + slack, "a stream keeps its order"
            last[task.stream] = end
    for resource in range(NUM_RESOURCES):
        work = sum(task.seconds * part for task in tasks for r, part in task.uses if r == resource)
        assert timeline.busy_seconds[resource] == pytest.approx(work, abs=slack), (
            "work is conserved"
        )
        assert work <= timeline.seconds + slack, "no resource is used over 100 %"
    assert timeline.seconds >= critical_path_seconds(tasks) - slack


FLOWS = st.tuples(
    st.dictionaries(st.integers(0, NUM_RESOURCES - 1), PARTS, max_size=3).map(
        lambda uses: tuple(uses.items())
    ),
    st.just(1.0) | st.floats(0.01, 100),
)


@examples(300)
@given(st.lists(FLOWS, max_size=10))
def test_rates_are_max_min_fair(flows: list[tuple[tuple[tuple[int, float], ...], float]]) -> None:
    """Nobody can have more without taking from one who has no more: each is held by a full one."""
    uses, weights = [uses for uses, _ in flows], [weight for _, weight in flows]
    rates = fair_rates(uses, weights)
    used = [0.0] * NUM_RESOURCES
    for rate, of_flow in zip(rates, uses, strict=True):
        for resource, part in of_flow:
            used[resource] += rate * part
    assert all(total <= 1 + 1e-9 for total in used)
    for rate, of_flow, weight in zip(rates, uses, weights, strict=True):
        assert 0 < rate <= 1
        held = [
            resource
            for resource, _ in of_flow
            if used[resource] > 1 - 1e-9
            and all(
                other / its <= rate / weight + 1e-9
                for other, theirs, its in zip(rates, uses, weights, strict=True)
                if any(r == resource for r, _ in theirs)
            )
        ]
        assert rate == 1 or held


def test_by_weight_a_slow_flow_keeps_what_equal_shares_would_give_it() -> None:
    fast, slow = ((0, 1.0),), ((0, 0.25),)
    assert fair_rates([fast, slow]) == pytest.approx([0.8, 0.8])
    assert fair_rates([fast, slow], [1, 4]) == pytest.approx([0.75, 1])
    assert fair_rates([fast, fast, slow], [1, 1, 4]) == pytest.approx([0.375, 0.375, 1])


def test_two_readers_of_one_link_take_twice_as_long() -> None:
    tasks = [Task("a", 0, 1.0, ((0, 1.0),)), Task("b", 1, 1.0, ((0, 1.0),))]
    assert simulate(tasks, 1).seconds == pytest.approx(2.0)
    halves = [Task("a", 0, 1.0, ((0, 0.5),)), Task("b", 1, 1.0, ((0, 0.5),))]
    assert simulate(halves, 1).seconds == pytest.approx(1.0)


def test_no_tasks_take_no_time() -> None:
    assert simulate([], 1).seconds == 0.0


def test_waiting_for_a_later_task_is_refused() -> None:
    with pytest.raises(ValueError, match="listed later"):
        simulate([Task("a", 0, 1.0, after=(1,)), Task("b", 0, 1.0)], 0)
