"""The order of rows: long outputs first, shared prefixes together, for the rest as in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.jobs.order import LEVEL_BYTES, PREFIX_BYTES, OrderBuilder, prompt_prefix
from elbowroom.jobs.rows import RejectedRow, Row

Rows = list[tuple[bytes, float]]

_LIMITS = st.sampled_from([0, 1, 5, 7, 64, 100, math.inf])
_CHUNKS = st.sampled_from([b"a" * 70, b"b" * 70, b"a" * 300, b"c" * 5, b""])
_PREFIXES = st.lists(_CHUNKS, max_size=4).map(b"".join)
_ROWS = st.lists(st.tuples(_PREFIXES, _LIMITS), max_size=40)

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", 2**40])
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner)
    ),
    max_leaves=20,
)


def _row(body: dict[str, Any]) -> Row:
    return Row(0, 1, "id", "/v1/chat/completions", body, 0)


def _order(rows: Rows) -> list[int]:
    builder = OrderBuilder()
    for prefix, limit in rows:
        builder.add(prefix, limit)
    order: list[int] = builder.order().tolist()
    return order


def _bucket(limit: float) -> float:
    """The power of two at or below a limit, as its exponent."""
    return math.floor(math.log2(limit)) if 0 < limit < math.inf else limit - 1


def _chat(*texts: str, **others: Any) -> dict[str, Any]:
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": messages, **others}


@given(_ROWS)
def test_every_row_once_and_longest_outputs_first(rows: Rows) -> None:
    order = _order(rows)
    assert sorted(order) == list(range(len(rows)))
    buckets = [_bucket(rows[index][1]) for index in order]
    assert buckets == sorted(buckets, reverse=True)


@given(_ROWS)
def test_rows_that_share_64_bytes_are_neighbours(rows: Rows) -> None:
    groups = [(_bucket(rows[i][1]), rows[i][0][:64]) for i in _order(rows)]
    changes = sum(one != other for one, other in pairwise(groups))
    assert changes == max(0, len(set(groups)) - 1)


@given(_ROWS)
def test_groups_within_groups_stand_where_their_first_row_does(rows: Rows) -> None:
    """The same order, by comparing whole prefixes with one another."""

    def key(index: int) -> list[float]:
        bucket, prefix = _bucket(rows[index][1]), rows[index][0]
        firsts = [
            next(i for i, (p, limit) in enumerate(rows) if group == (_bucket(limit), p[:level]))
            for level in LEVEL_BYTES
            for group in [(bucket, prefix[:level])]
        ]
        return [-bucket, *firsts, index]

    assert _order(rows) == sorted(range(len(rows)), key=key)


@given(st.lists(st.binary(max_size=200), max_size=40, unique_by=lambda prefix: prefix[:64]))
def test_without_shared_prefixes_the_order_of_the_file_stays(prefixes: list[bytes]) -> None:
    assert _order([(prefix, 64.0) for prefix in prefixes]) == list(range(len(prefixes)))


def test_longer_shared_prefixes_stand_closer() -> None:
    system, one, other = b"s" * 100, b"1" * 100, b"2" * 100
    alone = b"x" * 200
    rows = [system + one + b"a", alone, system + other + b"b", system + one + b"c", b"y", alone]
    assert _order([(row, math.inf) for row in rows]) == [0, 3, 2, 1, 5, 4]


def test_nothing_to_order() -> None:
    assert _order([]) == []


def test_rows_are_judged_by_their_bodies() -> None:
    builder = OrderBuilder()
    builder.visit(_row({"prompt": "short", "max_tokens": 3}))
    builder.visit(RejectedRow(1, 2, "id", "invalid_json", "no"))
    builder.visit(_row({"prompt": "a" * 64, "max_tokens": 40}))
    builder.visit(_row({"prompt": "b" * 64, "max_tokens": 40}))
    builder.visit(_row({"prompt": "a" * 64, "max_tokens": 50}))
    builder.visit(_row({"prompt": "a" * 64}))
    assert builder.order().tolist() == [5, 2, 4, 3, 0, 1]


def test_a_prefix_goes_as_far_as_the_prompts_agree() -> None:
    system = "You sort things. " * 9
    one = prompt_prefix(_chat(system, "b, a", temperature=0))
    other = prompt_prefix(_chat(system, "9, 8", temperature=1, max_tokens=5))
    both = system.encode()
    assert one != other
    assert one[: one.index(both) + len(both)] == other[: other.index(both) + len(both)]
    assert prompt_prefix(_chat(system, "b, a", "a, b", "d, c")).startswith(one)
    assert prompt_prefix(_chat(system, "b, a", max_tokens=7)) == one


def test_tools_come_before_messages() -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    prefix = prompt_prefix({**_chat("system", "question"), "tools": tools})
    assert prefix.index(b"look_up") < prefix.index(b"system") < prefix.index(b"question")


def test_a_field_that_is_null_is_none() -> None:
    assert prompt_prefix({**_chat("system"), "tools": None}) == prompt_prefix(_chat("system"))


def test_keys_of_a_message_may_stand_in_any_order() -> None:
    ordered = {"role": "user", "content": "Hello", "name": "me"}
    backwards = dict(reversed(ordered.items()))
    assert prompt_prefix({"messages": [ordered]}) == prompt_prefix({"messages": [backwards]})


@pytest.mark.parametrize("field", ["messages", "prompt", "input"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("abc", "abd"),
        ([1, 2, 3], [1, 2, 4]),
        ([1, 2, 3], [12, 3]),
        (["a", "b"], ["ab"]),
        ([[1, 2], [3]], [[1, 2], [4]]),
        ([1, 2**40], [1, 2**41]),
        ([{"role": "user", "content": "a"}], [{"role": "tool", "content": "a"}]),
    ],
)
def test_different_prompts_have_different_prefixes(field: str, one: Any, other: Any) -> None:
    assert prompt_prefix({field: one}) != prompt_prefix({field: other})
    assert prompt_prefix({field: one}) == prompt_prefix({field: one})


@given(st.dictionaries(st.sampled_from(["tools", "messages", "prompt", "input", "n"]), _JSON))
def test_any_json_has_a_prefix(body: dict[str, Any]) -> None:
    prefix = prompt_prefix(body)
    assert len(prefix) <= PREFIX_BYTES
    assert prompt_prefix(body) == prefix


def test_nesting_may_be_deep() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(prompt_prefix({"messages": nested})) == PREFIX_BYTES


def test_numbers_may_be_long() -> None:
    """Python refuses to write more than 4,300 decimal digits."""
    assert prompt_prefix({"prompt": [10**6000]}) != prompt_prefix({"prompt": [10**6000 + 1]})


class _Counted(list[Any]):
    """Knows how many of its values were looked at, one by one."""

    num_seen = 0

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            self.num_seen += 1
            yield value


@pytest.mark.parametrize("value", ["word", "", [], {}, {"role": "user", "content": "x"}, 0.5])
def test_the_end_of_a_long_prompt_is_not_read(value: Any) -> None:
    values = _Counted([value] * (PREFIX_BYTES + 10))
    assert len(prompt_prefix({"messages": values})) == PREFIX_BYTES
    assert 0 < values.num_seen <= PREFIX_BYTES


def test_only_the_beginning_of_a_long_text_matters() -> None:
    text = "x" * PREFIX_BYTES
    assert prompt_prefix({"prompt": text + "a"}) == prompt_prefix({"prompt": text + "b"})
    assert prompt_prefix({"prompt": "a" + text}) != prompt_prefix({"prompt": "b" + text})
