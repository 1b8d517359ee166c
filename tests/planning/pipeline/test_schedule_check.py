"""The validator against a toy runtime, on schedules and on mutants of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import ScheduleError
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.schedule_check import check_schedule, execution_order
from elbowroom.plans.pipeline_actions import PipelineAction, Recv, Schedule, Send, Update
from tests.examples import examples
from tests.planning.pipeline.schedules import Refused, ToyRuntime, schedules

Lists = list[list[PipelineAction]]


@examples(200)
@given(schedules())
def test_every_schedule_is_valid(schedule: Schedule) -> None:
    check_schedule(schedule)
    check_schedule(schedule, "gradients")
    ToyRuntime(schedule).run()


@given(schedules(most_minibatches=8))
def test_execution_order_has_every_list_in_its_order(schedule: Schedule) -> None:
    steps = list(execution_order(schedule))
    for worker, actions in enumerate(schedule.actions):
        assert tuple(step.action for step in steps if step.worker == worker) == actions


def drop(data: st.DataObject, actions: list[PipelineAction]) -> None:
    del actions[data.draw(st.integers(0, len(actions) - 1))]


def duplicate(data: st.DataObject, actions: list[PipelineAction]) -> None:
    copied = actions[data.draw(st.integers(0, len(actions) - 1))]
    actions.insert(data.draw(st.integers(0, len(actions))), copied)


def swap(data: st.DataObject, actions: list[PipelineAction]) -> None:
    places = st.integers(0, len(actions) - 1)
    one, two = data.draw(places), data.draw(places)
    actions[one], actions[two] = actions[two], actions[one]


def swap_neighbours(data: st.DataObject, actions: list[PipelineAction]) -> None:
    place = data.draw(st.integers(0, max(0, len(actions) - 2)))
    actions[place : place + 2] = reversed(actions[place : place + 2])


def move(data: st.DataObject, actions: list[PipelineAction]) -> None:
    taken = actions.pop(data.draw(st.integers(0, len(actions) - 1)))
    actions.insert(data.draw(st.integers(0, len(actions))), taken)


def renumber(data: st.DataObject, actions: list[PipelineAction]) -> None:
    place = data.draw(st.integers(0, len(actions) - 1))
    action, step = actions[place], data.draw(st.sampled_from([-1, 1]))
    if isinstance(action, Send | Recv) and data.draw(st.booleans()):
        actions[place] = replace(action, worker=action.worker + step)
    else:
        actions[place] = replace(action, minibatch=action.minibatch + step)


@pytest.mark.parametrize("mutate", [drop, duplicate, swap, swap_neighbours, move, renumber])
def test_mutants_are_refused_by_both_or_by_none(
    mutate: Callable[[st.DataObject, list[PipelineAction]], None],
) -> None:
    """Some mutants are schedules as well: a send a little later, an update left to the next."""
    verdicts = []

    @examples(200)
    @given(schedules(most_minibatches=8), st.data())
    def check(schedule: Schedule, data: st.DataObject) -> None:
        lists = [list(actions) for actions in schedule.actions]
        busy = [worker for worker, actions in enumerate(lists) if actions]
        mutate(data, lists[data.draw(st.sampled_from(busy))])
        mutant = replace(schedule, actions=tuple(map(tuple, lists)))
        verdicts.append(is_trained(mutant))
        assert is_accepted(mutant) == verdicts[-1]

    check()
    assert False in verdicts, "no mutant was wrong"


def is_trained(schedule: Schedule) -> bool:
    try:
        ToyRuntime(schedule).run()
    except Refused:
        return False
    return True


def is_accepted(schedule: Schedule) -> bool:
    try:
        check_schedule(schedule)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("replicas", [(1,), (1, 1, 1), (3, 1), (2, 3), (1, 2, 1)])
def test_no_action_can_be_left_out(replicas: tuple[int, ...]) -> None:
    """But an update of a straight stage before its last: the next counts its minibatch too."""
    schedule = plan_schedule(replicas, 5)
    for worker, actions in enumerate(schedule.actions):
        for place, action in enumerate(actions):
            lists = list(schedule.actions)
            lists[worker] = actions[:place] + actions[place + 1 :]
            is_straight = replicas[schedule.stages[worker]] == 1
            is_late = isinstance(action, Update) and is_straight and action.minibatch < 4
            assert is_accepted(replace(schedule, actions=tuple(lists))) == is_late, str(action)


def check_text(text: str) -> None:
    check_schedule(Schedule.parse(text))


@pytest.mark.parametrize(
    ("text", "worker", "action", "problem"),
    [
        ("1 x 1\nF1.0", 0, "F1.0", "belongs to stage 0"),
        ("1 x 1\nF0.1", 0, "F0.1", "there are 1 minibatches"),
        ("1 x 1\nF0.0 F0.0", 0, "F0.0", "has done that already"),
        ("1 x 1\nF0.0 U0.0", None, None, "no worker of stage 0 does B0.0"),
        ("1 x 1\nB0.0 F0.0 U0.0", 0, "B0.0", "its forward has not run on this worker"),
        ("1 x 1\nF0.0 B0.0", 0, None, "gradients of minibatches 0 to 0 update nothing"),
        ("1 x 1\nF0.0 U0.0 B0.0", 0, "U0.0", r"counts minibatches \[0\], gradients are of \[\]"),
        ("1 x 1\nF0.0 B0.0 M0.0 U0.0", 0, "M0.0", "no replicas"),
        ("1-1 x 1\nF0.0 SA0.0>0\n", 0, "SA0.0>0", "none of the workers behind"),
        (
            "1-1 x 1\nF0.0 SA0.0>1 B0.0 U0.0\nF1.0 B1.0 U1.0",
            *(0, "SA0.0>1", "1 more sent than worker 1 receives"),
        ),
        (
            "1-1 x 1\nF0.0 B0.0 U0.0\nRA1.0<0 F1.0 B1.0 U1.0",
            *(1, "RA1.0<0", "1 more received than worker 0 sends"),
        ),
        (
            "1-1 x 2\nF0.0 SA0.0>1 F0.1 SA0.1>1 B0.0 B0.1\nRA1.1<0 F1.1 RA1.0<0 F1.0 B1.0 B1.1",
            *(1, "RA1.1<0", "SA0.0>1 of worker 0 comes before it"),
        ),
        (
            "1-1 x 1\nF0.0 SA0.0>1 RG0.0<1 B0.0 U0.0\nF1.0 RA1.0<0 B1.0 SG1.0>0 U1.0",
            *(1, "F1.0", "its input has not arrived"),
        ),
        (
            "1-1 x 1\nRG0.0<1 F0.0 SA0.0>1 B0.0 U0.0\nRA1.0<0 F1.0 B1.0 SG1.0>0 U1.0",
            *(0, "RG0.0<1", "deadlock: it waits for SG1.0>0 of worker 1"),
        ),
        ("2 x 1\nF0.0 B0.0 M0.0 U0.0\n", 0, "M0.0", "deadlock: it waits for worker 1 to enter"),
        (
            "2 x 2\nF0.0 B0.0 M0.0 U0.0 M0.1 U0.1\nF0.1 B0.1 M0.1 U0.1 M0.0 U0.0",
            *(0, "M0.0", "other replicas are at M0.1"),
        ),
        (
            "2 x 4\nF0.0 F0.2 B0.0 M0.1 B0.2 U0.1 M0.3 U0.3\nF0.1 B0.1 M0.1 F0.3 U0.1 B0.3 M0.3",
            *(0, "B0.2", "between a reduce of 1 and its update"),
        ),
        (
            "2 x 4\nF0.0 F0.2 B0.0 M0.1 M0.3 B0.2 U0.3\nF0.1 B0.1 M0.1 U0.1 F0.3 B0.3 M0.3 U0.3",
            *(0, "M0.3", "the update of 1 is missing"),
        ),
        ("2 x 1\nF0.0 B0.0 U0.0 M0.0\nM0.0 U0.0", 0, "U0.0", "does not follow its reduce"),
    ],
)
def test_what_an_error_names(
    text: str, worker: int | None, action: str | None, problem: str
) -> None:
    with pytest.raises(ScheduleError, match=problem) as caught:
        check_text(text)
    assert caught.value.worker == worker
    assert caught.value.action == action
    assert (f"worker {worker}" in str(caught.value)) == (worker is not None)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple), st.integers(5, 9))
def test_one_forward_one_backward_needs_sends_that_do_not_wait(
    replicas: tuple[int, ...], num_minibatches: int
) -> None:
    """From as many minibatches on as some worker alternates; GPipe's transfers go one way."""
    schedule = plan_schedule(replicas, num_minibatches)
    with pytest.raises(ScheduleError, match="deadlock"):
        check_schedule(schedule, "rendezvous")
    check_schedule(schedule, "gradients")
    check_schedule(plan_schedule(replicas, num_minibatches, "gpipe", 4), "rendezvous")
