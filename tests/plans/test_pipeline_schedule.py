"""Streams of actions: when they come, as minibatches are fed, and what a drain does to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from elbowroom.plans.pipeline_actions import PipelineAction
from elbowroom.plans.pipeline_schedule import KINDS, ActionStream, ScheduleRule
from elbowroom.plans.pipeline_shape import Pipe

REPLICAS = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def text(actions: Iterable[PipelineAction]) -> str:
    return " ".join(map(str, actions))


def test_what_each_minibatch_sets_off() -> None:
    stream = ActionStream(Pipe((1, 1)), 0, ScheduleRule())
    assert text(stream.feed()) == "F0.0 SA0.0>1"
    assert text(stream.feed()) == "F0.1 SA0.1>1 RG0.0<1 B0.0 U0.0"
    assert text(stream.feed()) == "F0.2 SA0.2>1 RG0.1<1 B0.1 U0.1"
    assert text(stream.drain()) == "RG0.2<1 B0.2 U0.2"
    assert text(stream.drain()) == ""


def test_an_update_waits_until_its_round_is_fed() -> None:
    stream = ActionStream(Pipe((1, 2)), 1, ScheduleRule())
    assert text(stream.feed()) == "RA1.0<0 F1.0 B1.0 SG1.0>0"
    assert text(stream.feed()) == "M1.1 U1.1"
    assert text(stream.feed()) == "RA1.2<0 F1.2 B1.2 SG1.2>0"
    assert text(stream.drain()) == "M1.2 U1.2"


def test_a_flush_comes_by_itself() -> None:
    stream = ActionStream(Pipe((1,)), 0, ScheduleRule("gpipe", 2))
    assert text(stream.feed()) == "F0.0"
    assert text(stream.feed()) == "F0.1 B0.0 B0.1 U0.1"
    assert text(stream.feed()) == "F0.2"
    assert text(stream.drain()) == "B0.2 U0.2"


def test_after_a_drain_all_stages_begin_a_round() -> None:
    stream = ActionStream(Pipe((3, 2)), 1, ScheduleRule(), first_minibatch=7)
    assert stream.next_minibatch == 12
    assert stream.next_own_minibatch == 13
    for _ in range(2):
        list(stream.feed())
    assert stream.next_own_minibatch == 16
    list(stream.drain())
    assert stream.next_minibatch == 18


@given(st.data(), REPLICAS, st.sampled_from(KINDS), st.integers(1, 9), st.integers(0, 9))
def test_every_fill_is_like_the_first(
    data: st.DataObject,
    replicas: tuple[int, ...],
    kind: str,
    num_minibatches: int,
    num_before: int,
) -> None:
    """Only the numbers of minibatches are higher, whatever came before."""
    flush_every = None if kind == "1f1b" else data.draw(st.integers(1, 5))
    rule = ScheduleRule(kind, flush_every)  # type: ignore[arg-type]
    pipe = Pipe(replicas)
    worker = data.draw(st.integers(0, pipe.num_workers - 1))

    def fill(stream: ActionStream, count: int) -> list[PipelineAction]:
        fed = [action for _ in range(count) for action in stream.feed()]
        return [*fed, *stream.drain()]

    later = ActionStream(pipe, worker, rule)
    fill(later, num_before)
    begin = later.next_minibatch
    first = fill(ActionStream(pipe, worker, rule), num_minibatches)
    shifted = [replace(action, minibatch=action.minibatch + begin) for action in first]
    assert fill(later, num_minibatches) == shifted
