"""Messages over a socket pair: whole, in order, typed, and the end of the peer is seen."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.engine.wire import (
    Channel,
    Failed,
    Message,
    MessageError,
    Ready,
    RowAnswer,
    RowFailure,
    RowRequest,
    Start,
    Stats,
    Stop,
    Stopped,
    decode,
    encode,
)
from elbowroom.plans.pool import Layout, Prediction
from elbowroom.pool.stats import PoolStats
from tests.examples import examples
from tests.jobs.plans import make_plan

STATS = Stats(3, 1, 0.5, 100, 50, 2, 10, 5, PoolStats(owned_bytes=7, wait_seconds=0.25))
PLAN = replace(
    make_plan(2, "streamed"),
    layout=Layout(1, 2, 1, "streamed"),
    prediction=Prediction("a", 10, 500, 480, 40.0, 34.0, 46.0),
)
MESSAGES: list[Message] = [
    Start(PLAN, 1, "/run/elbowroom-1"),
    RowRequest(7, "/v1/completions", {"prompt": "x", "n": None}, "req_1", 1.5, 10),
    RowRequest(0, "/v1/completions", {}, "", None, None),
    RowRequest(0, "/v1/completions", {}, "", 5, None),  # a whole number of seconds
    Stop(),
    Ready(num_kv_tokens=640, resident_bytes=99, start_seconds=0.5),
    RowAnswer(7, 200, {"text": "y"}),
    RowAnswer(8, 500, None),
    RowFailure(7, "row_timeout", "no answer within 1 s"),
    STATS,
    Stopped(STATS),
    Failed("no memory"),
]


@asynccontextmanager
async def _pair() -> AsyncIterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    one, other = await Channel.over(ours), await Channel.over(theirs)
    try:
        yield one, other
    finally:
        one.close()
        other.close()


async def _round_trip(messages: list[Message]) -> list[Message | None]:
    async with _pair() as (one, other):
        for message in messages:
            one.send(message)
        return [await other.receive() for _ in messages]


def test_every_message_arrives_as_it_was_sent() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))
    assert asyncio.run(_round_trip(MESSAGES)) == MESSAGES


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(VALUES, max_size=4))
@examples(50)
def test_any_body_passes(bodies: list[Any]) -> None:
    messages: list[Message] = [RowAnswer(0, 200, body) for body in bodies]
    assert asyncio.run(_round_trip(messages)) == messages


@pytest.mark.parametrize("text", ["", "a\nb", "é😀", "half \ud83d of a pair", "\0"])
def test_any_text_passes(text: str) -> None:
    assert asyncio.run(_round_trip([Failed(text)])) == [Failed(text)]


def _json(message: Message, **changes: Any) -> dict[str, Any]:
    return {**json.loads(encode(message)), **changes}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "no JSON"),
        (b"{broken", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", r"no message of this version: \[1\]"),
        (b"{}", "no message of this version"),
        (b'{"type": ["Stop"]}', "no message of this version"),
        (b'{"type": "Reset"}', "no message of this version: 'Reset'"),
        (b'{"type": "PoolStats"}', "no message of this version: 'PoolStats'"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        decode(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_json(Stop(), why="x"), "Stop has .*, not {'why': 'x'}"),
        ({"type": "RowAnswer", "id": 1, "status": 200}, "RowAnswer has id, status, body, not"),
        (_json(MESSAGES[1], id="7"), "RowRequest.id is int, not '7'"),
        (_json(MESSAGES[1], id=None), "RowRequest.id is int, not None"),
        (_json(MESSAGES[1], id=1.5), "RowRequest.id is int, not 1.5"),
        (_json(MESSAGES[1], body=[]), "RowRequest.body is dict, not"),
        (
            _json(MESSAGES[1], max_seconds="1"),
            "RowRequest.max_seconds is float or .*, not '1'",
        ),
        (_json(Failed(""), error=["x" * 1000]), r"Failed.error is str, not \['x{78}\.\.\.$"),
        (_json(STATS, pool={"owned_bytes": 1}), "PoolStats has owned_bytes, .*, not"),
        (_json(Stopped(STATS), stats=None), "Stats has num_requests_running, .*, not None"),
        (_json(MESSAGES[0], plan={"model_dir": "x"}), "Start has a plan, not ValueError"),
        (_json(MESSAGES[0], plan=3), "Start has a plan, not ValueError"),
    ],
)
def test_a_malformed_message_is_refused(data: dict[str, Any], words: str) -> None:
    async def exchange() -> None:
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        line = json.dumps(data).encode()
        theirs.sendall(struct.pack("<I", len(line)) + line)
        try:
            await channel.receive()
        finally:
            theirs.close()
            channel.close()

    with pytest.raises(MessageError, match=words):
        asyncio.run(exchange())


def test_what_is_no_json_is_not_sent() -> None:
    with pytest.raises(TypeError, match="cannot be part of a message"):
        encode(RowAnswer(0, 200, {"path": Path("x")}))


def test_a_large_message_passes_while_both_ends_work() -> None:
    async def exchange() -> Any:
        async with _pair() as (one, other):
            one.send(Failed("x" * 5_000_000))
            one.send(Stop())
            _, first = await asyncio.gather(one.drain(), other.receive())
            return first, await other.receive()

    first, last = asyncio.run(exchange())
    assert len(first.error) == 5_000_000
    assert last == Stop()


def test_drain_waits_for_a_slow_reader() -> None:
    async def exchange() -> bool:
        async with _pair() as (one, _other):
            one.send(Failed("x" * 5_000_000))
            try:
                await asyncio.wait_for(one.drain(), 0.05)
            except TimeoutError:
                return True
            return False

    assert asyncio.run(exchange())


def test_the_end_of_the_peer_is_none() -> None:
    async def exchange() -> list[Message | None]:
        async with _pair() as (one, other):
            one.send(Stop())
            one.close()
            return [await other.receive(), await other.receive(), await other.receive()]

    assert asyncio.run(exchange()) == [Stop(), None, None]


@pytest.mark.parametrize("torn", [b"\x05", struct.pack("<I", 10) + b'{"ty'])
def test_a_torn_message_is_the_end(torn: bytes) -> None:
    async def exchange() -> Message | None:
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        theirs.sendall(torn)
        theirs.close()
        message = await channel.receive()
        channel.close()
        return message

    assert asyncio.run(exchange()) is None


def test_writing_to_a_peer_that_is_gone_is_no_error() -> None:
    """Its end shows where it is listened to; a second way to see it would only race the first."""

    async def exchange() -> Message | None:
        async with _pair() as (one, other):
            other.close()
            for _ in range(20):
                one.send(Failed("x" * 100_000))
                await one.drain()
                await asyncio.sleep(0)
            return await one.receive()

    assert asyncio.run(exchange()) is None
