"""Text forms of a pipeline's actions and schedules, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.plans.pipeline_actions import (
    Backward,
    Forward,
    PipelineAction,
    RecvActivation,
    RecvGradient,
    Reduce,
    Schedule,
    SendActivation,
    SendGradient,
    Update,
    message_of,
    parse_action,
)
from elbowroom.plans.pool_actions import Fetch, Release, Run, Ship, Wait

NUMBERS = st.integers(0, 10**6)
ACTIONS: st.SearchStrategy[PipelineAction] = st.one_of(
    *(st.builds(kind, NUMBERS, NUMBERS) for kind in (Forward, Backward, Reduce, Update)),
    *(
        st.builds(kind, NUMBERS, NUMBERS, NUMBERS)
        for kind in (SendActivation, RecvActivation, SendGradient, RecvGradient)
    ),
)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Forward(1, 5), "F1.5"),
        (Backward(1, 5), "B1.5"),
        (SendActivation(1, 5, 4), "SA1.5>4"),
        (RecvActivation(1, 5, 0), "RA1.5<0"),
        (SendGradient(1, 5, 0), "SG1.5>0"),
        (RecvGradient(1, 5, 4), "RG1.5<4"),
        (Reduce(1, 5), "M1.5"),
        (Update(1, 5), "U1.5"),
    ],
)
def test_text_forms(action: PipelineAction, text: str) -> None:
    assert str(action) == text
    assert parse_action(text) == action


@given(ACTIONS)
def test_parse_undoes_str(action: PipelineAction) -> None:
    parsed = parse_action(str(action))
    assert parsed == action
    assert type(parsed) is type(action)


@given(ACTIONS, ACTIONS)
def test_different_actions_have_different_texts(one: PipelineAction, two: PipelineAction) -> None:
    assert (str(one) == str(two)) == (one == two)


@given(st.from_regex(r"\A(F|B|M|U|SA|RA|SG|RG|S|X)?0?[0-9]{0,2}\.?[0-9]{0,2}[<>]?[0-9]?\s?\Z"))
def test_what_is_parsed_is_what_is_written(text: str) -> None:
    try:
        action = parse_action(text)
    except ValueError:
        return
    assert str(action) == text


@pytest.mark.parametrize(
    "text",
    ["", "F", "F1", "F1.2>3", "SA1.2", "SA1.2<3", "RA1.2>3", "F01.2", "F1.2 ", "f1.2", "F-1.2"],
)
def test_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="not an action of a pipeline"):
        parse_action(text)


@pytest.mark.parametrize(
    "other", [Fetch(1, 5, 2), Run(1, "A"), Run(1, "F"), Wait(1), Release(1), Ship(1)]
)
def test_actions_of_inference_are_others(other: object) -> None:
    with pytest.raises(ValueError, match="not an action of a pipeline"):
        parse_action(str(other))


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    st.integers(1, 9),
    st.data(),
)
def test_schedules_as_text(
    replicas: tuple[int, ...], num_minibatches: int, data: st.DataObject
) -> None:
    lists = st.lists(ACTIONS, max_size=4).map(tuple)
    actions = tuple(data.draw(lists) for _ in range(sum(replicas)))
    schedule = Schedule(replicas, num_minibatches, actions)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not such as"),
        ("3-1", "is not such as"),
        ("1 x 1\nF0.0\nF0.1", "2 lists for 1 workers"),
        ("1 x 1\nF0", "'F0' is not an action"),
        ("0-1 x 1\nF0.0", "at least one"),
        ("1 x 0\nF0.0", "at least 1"),
    ],
)
def test_refuses_other_schedules(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Schedule.parse(text)


@given(ACTIONS, NUMBERS)
def test_both_ends_of_a_message(action: PipelineAction, worker: int) -> None:
    if isinstance(action, SendActivation | SendGradient):
        message = message_of(worker, action)
        assert message.send == action
        assert message_of(action.worker, message.recv) == message
        assert message.recv.worker == worker
    elif isinstance(action, RecvActivation | RecvGradient):
        message = message_of(worker, action)
        assert message.recv == action
        assert message_of(action.worker, message.send) == message


def test_workers_are_counted_stage_by_stage() -> None:
    schedule = Schedule((3, 1, 2), 1, ((),) * 6)
    assert schedule.stages == (0, 0, 0, 1, 2, 2)
    assert [list(schedule.workers(stage)) for stage in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert not schedule.workers(-1)
    assert not schedule.workers(3)
