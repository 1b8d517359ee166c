"""The dispatcher: nobody idles while another queues, and no row is lost or held back for ever."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.jobs.dispatcher import (
    Dispatcher,
    Intake,
    Offer,
    RowEstimator,
    TokenUsage,
    token_usage,
)
from elbowroom.jobs.rows import RejectedRow, Row


def _row(index: int = 0, **body: Any) -> Row:
    """A chat with its text as a prompt would hold it: without max_tokens it has no limit."""
    body.setdefault("prompt", "x" * 40)
    url = "/v1/embeddings" if "input" in body else "/v1/chat/completions"
    return Row(index, index + 1, f"id-{index}", url, body, index)


def _rejected(index: int) -> RejectedRow:
    return RejectedRow(index, index + 1, f"id-{index}", "invalid_json", "no")


def _dispatcher(
    rows: Iterable[Row | RejectedRow], *kv_tokens: int, max_rows: int = 100
) -> tuple[Dispatcher, dict[int, Intake]]:
    dispatcher = Dispatcher(rows)
    for replica, tokens in enumerate(kv_tokens):
        dispatcher.join(replica, tokens, max_rows)
    return dispatcher, dispatcher._intakes


def _offers(dispatcher: Dispatcher) -> list[Offer]:
    return [offer for offer in dispatcher.offers() if isinstance(offer, Offer)]


def test_rows_go_where_there_is_most_room() -> None:
    dispatcher, _ = _dispatcher((_row(i, max_tokens=90) for i in range(8)), 1000, 400)
    takers = [offer.replica for offer in _offers(dispatcher)]
    assert takers == [0] * 6 + [1, 0] or takers.count(1) in (1, 2)
    assert set(takers) == {0, 1}


def test_no_replica_idles_while_another_queues() -> None:
    dispatcher, intakes = _dispatcher((_row(i, max_tokens=90) for i in range(30)), 450, 450, 450)
    started = _offers(dispatcher)
    assert [sum(o.replica == replica for o in started) for replica in range(3)] == [4, 4, 4]
    for offer in [o for o in started if o.replica == 1]:
        dispatcher.finish(1, offer.row.index, None)
    following = _offers(dispatcher)
    assert {offer.replica for offer in following} == {1}
    assert len(intakes[1].rows) == 4
    assert _offers(dispatcher) == []


def test_no_more_rows_than_allowed() -> None:
    dispatcher, intakes = _dispatcher(
        (_row(i, max_tokens=1) for i in range(9)), 10**6, 10**6, max_rows=3
    )
    assert len(_offers(dispatcher)) == 6
    assert [len(intake.rows) for intake in intakes.values()] == [3, 3]


def test_a_row_larger_than_the_cache_goes_to_an_empty_replica() -> None:
    rows = [_row(0, max_tokens=10), _row(1, max_tokens=10**6), _row(2, max_tokens=10)]
    dispatcher, intakes = _dispatcher(rows, 100)
    assert [offer.row.index for offer in _offers(dispatcher)] == [0], "row 1 waits for its turn"
    dispatcher.finish(0, 0, None)
    assert [offer.row.index for offer in _offers(dispatcher)] == [1]
    assert not intakes[0].has_room(1), "nothing is added to a row that fills the cache"
    dispatcher.finish(0, 1, None)
    assert [offer.row.index for offer in _offers(dispatcher)] == [2]


def test_rejected_rows_pass_through_in_order_and_take_no_room() -> None:
    rows = [_rejected(0), _row(1, max_tokens=50), _rejected(2), _row(3, max_tokens=50)]
    dispatcher, _ = _dispatcher(rows, 70)
    first = list(dispatcher.offers())
    assert [type(offer) for offer in first] == [RejectedRow, Offer, RejectedRow]
    assert not dispatcher.is_done
    dispatcher.finish(0, 1, None)
    assert [offer.row.index for offer in _offers(dispatcher)] == [3]
    dispatcher.finish(0, 3, None)
    assert _offers(dispatcher) == []
    assert dispatcher.is_done


def test_only_rejected_rows() -> None:
    dispatcher, _ = _dispatcher([_rejected(0), _rejected(1)], 70)
    assert not dispatcher.is_done
    assert len(list(dispatcher.offers())) == 2
    assert dispatcher.is_done


@given(st.lists(st.integers(1, 300), max_size=30), st.lists(st.integers(1, 500), min_size=1))
def test_every_row_is_offered_once_and_in_order(limits: list[int], kv_tokens: list[int]) -> None:
    rows = [_row(i, max_tokens=limit) for i, limit in enumerate(limits)]
    dispatcher, intakes = _dispatcher(rows, *kv_tokens, max_rows=4)
    seen = []
    while not dispatcher.is_done:
        seen += [offer.row.index for offer in _offers(dispatcher)]
        for intake in intakes.values():
            assert intake.free_tokens >= 0 or len(intake.rows) == 1
        busy = [(r, i) for r, intake in intakes.items() for i in intake.rows]
        assert len(busy) == dispatcher.num_in_flight
        assert busy or dispatcher.is_done, "rows wait although every replica is empty"
        for replica, index in busy[:1]:
            assert dispatcher.finish(replica, index, None) is rows[index]
    assert seen == list(range(len(rows)))


def test_rows_are_read_as_there_is_room() -> None:
    taken = []
    dispatcher, _ = _dispatcher((taken.append(i) or _row(i) for i in range(10**9)), 1000)  # type: ignore[func-returns-value]
    assert len(taken) <= len(_offers(dispatcher)) + 1 < 20


def test_finishing_a_row_twice_is_an_error() -> None:
    dispatcher, _ = _dispatcher([_row(0)], 1000)
    _offers(dispatcher)
    dispatcher.finish(0, 0, None)
    with pytest.raises(KeyError):
        dispatcher.finish(0, 0, None)


def test_estimator_believes_the_row_until_it_has_learned() -> None:
    estimator = RowEstimator()
    assert 500 <= estimator.num_tokens(_row(max_tokens=500)) <= 530
    for _ in range(50):
        estimator.learn(_row(max_tokens=500), TokenUsage(prompt_tokens=11, output_tokens=20))
    assert estimator.num_tokens(_row(max_tokens=500)) <= 50, "rows end long before their limit"
    assert estimator.num_tokens(_row(max_tokens=5)) <= 20, "a limit still holds"


def test_estimator_learns_bytes_per_token() -> None:
    estimator = RowEstimator()
    long = _row(prompt="x" * 4000, max_tokens=1)
    before = estimator.num_tokens(long)
    for _ in range(50):
        estimator.learn(long, TokenUsage(prompt_tokens=4000, output_tokens=1))
    assert before == pytest.approx(1000, rel=0.05)
    assert estimator.num_tokens(long) == pytest.approx(4000, rel=0.05)


def test_estimator_begins_with_what_it_is_told() -> None:
    told = RowEstimator(bytes_per_token=8.0)
    assert told.num_tokens(_row(prompt="x" * 4000, max_tokens=1)) == pytest.approx(500, rel=0.05)


def test_estimator_is_cautious_when_outputs_vary() -> None:
    steady, varied = RowEstimator(), RowEstimator()
    for number in range(100):
        steady.learn(_row(), TokenUsage(10, 100))
        varied.learn(_row(), TokenUsage(10, 200 * (number % 2)))
    assert varied.num_tokens(_row()) > steady.num_tokens(_row()) + 50


@pytest.mark.parametrize(
    ("body", "least", "most"),
    [
        ({"prompt": [1, 2, 3], "max_tokens": 4}, 7, 9),
        ({"max_tokens": 30, "n": 3}, 90, 110),
        ({"max_completion_tokens": 30}, 30, 50),
        ({"max_tokens": 90, "max_completion_tokens": 30}, 30, 50),
        ({"input": "x" * 40, "prompt": ""}, 5, 20),
        ({"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 1}, 100, 130),
    ],
)
def test_estimates(body: dict[str, Any], least: int, most: int) -> None:
    assert least <= RowEstimator().num_tokens(_row(**body)) <= most


ODD: list[Any] = [None, True, -1, -(10**9), 0, 10**400, -(10**400), 1.5, "7", [], {}]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n", "prompt", "messages"])
@pytest.mark.parametrize("learned", [False, True])
def test_odd_values_are_left_to_the_engine_to_refuse(key: str, value: Any, learned: bool) -> None:
    """One such row must neither end the job nor make the replicas look emptier than they are."""
    estimator = RowEstimator()
    if learned:
        estimator.learn(_row(), TokenUsage(10, 10))
    assert estimator.num_tokens(_row(**{key: value})) >= 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, TokenUsage(3, 4)),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": None}}, TokenUsage(3, 0)),
        ({"usage": {"prompt_tokens": 3}}, TokenUsage(3, 0)),
        ({"usage": None}, None),
        ({"error": {}}, None),
        ([], None),
        (None, None),
    ],
)
def test_token_usage(body: Any, expected: TokenUsage | None) -> None:
    assert token_usage(body) == expected


def _run_with_killers(killers: set[int], num_rows: int, num_replicas: int) -> tuple[list[int], int]:
    """Answer rows one by one; a replica that holds a killer dies. Returns who was given up."""
    dispatcher, intakes = _dispatcher(
        map(_row, range(num_rows)), *[10**6] * num_replicas, max_rows=16
    )
    given_up: list[int] = []
    answered: list[int] = []
    num_deaths = 0
    while not dispatcher.is_done:
        for offer in _offers(dispatcher):
            held = intakes[offer.replica]
            assert held.suspects is None or not set(held.rows) & set(answered)
        for replica in range(num_replicas):
            rows = dict(intakes[replica].rows)
            if killers & set(rows):
                num_deaths += 1
                given_up += [row.index for row in dispatcher.lose(replica)]
                dispatcher.join(replica, 10**6, 16)
            else:
                for index in rows:
                    dispatcher.finish(replica, index, None)
                    answered.append(index)
    assert sorted(answered + given_up) == list(range(num_rows)), "every row exactly once"
    return given_up, num_deaths


@given(st.sets(st.integers(0, 59), max_size=6), st.integers(1, 3))
def test_rows_that_kill_are_given_up_and_no_others(killers: set[int], num_replicas: int) -> None:
    given_up, num_deaths = _run_with_killers(killers, 60, num_replicas)
    assert set(given_up) == killers
    assert num_deaths <= 6 * len(killers)  # halved from 16 to 1, and the first death


def test_a_row_is_given_up_only_when_it_has_killed_twice() -> None:
    dispatcher, _ = _dispatcher([_row(0)], 1000)
    assert len(_offers(dispatcher)) == 1
    assert dispatcher.lose(0) == []
    assert not dispatcher.is_done
    dispatcher.join(0, 1000, 8)
    assert len(_offers(dispatcher)) == 1
    assert [row.index for row in dispatcher.lose(0)] == [0]
    assert dispatcher.is_done


def test_suspects_are_tried_apart_from_others_while_those_go_on() -> None:
    dispatcher, intakes = _dispatcher(map(_row, range(40)), 10**6, 10**6, max_rows=4)
    _offers(dispatcher)
    suspects = set(intakes[0].rows)
    assert dispatcher.lose(0) == []
    _offers(dispatcher)
    assert not suspects & set(intakes[1].rows), "a replica with other rows takes none"
    dispatcher.join(0, 10**6, 4)
    _offers(dispatcher)
    assert set(intakes[0].rows) < suspects, "half of them"
    assert dispatcher.holds_suspects(0)
    assert not dispatcher.holds_suspects(1)


def test_losing_a_replica_that_holds_nothing() -> None:
    dispatcher, _ = _dispatcher([_row(0)], 1000)
    assert dispatcher.lose(0) == []
    assert dispatcher.lose(0) == []
    assert _offers(dispatcher) == []
    assert not dispatcher.is_done, "the row still waits for a replica"
