"""Messages over a socket pair: whole, in order, and the end of the peer is seen."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.engine.wire import Channel, Message
from tests.examples import examples


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4))
@examples(50)
def test_messages_arrive_as_they_were_sent(messages: list[Message]) -> None:
    assert asyncio.run(_round_trip(messages)) == messages


@pytest.mark.parametrize("text", ["", "a\nb", "é😀", "half \ud83d of a pair", "\0"])
def test_any_text_passes(text: str) -> None:
    assert asyncio.run(_round_trip([{"text": text}])) == [{"text": text}]


def test_a_large_message_passes_while_both_ends_work() -> None:
    async def exchange() -> Any:
        async with _pair() as (one, other):
            one.send({"body": "x" * 5_000_000})
            one.send({"type": "last"})
            _, first = await asyncio.gather(one.drain(), other.receive())
            return first, await other.receive()

    first, last = asyncio.run(exchange())
    assert len(first["body"]) == 5_000_000
    assert last == {"type": "last"}


def test_drain_waits_for_a_slow_reader() -> None:
    async def exchange() -> bool:
        async with _pair() as (one, _other):
            one.send({"body": "x" * 5_000_000})
            try:
                await asyncio.wait_for(one.drain(), 0.05)
            except TimeoutError:
                return True
            return False

    assert asyncio.run(exchange())


def test_the_end_of_the_peer_is_none() -> None:
    async def exchange() -> list[Message | None]:
        async with _pair() as (one, other):
            one.send({"type": "last"})
            one.close()
            return [await other.receive(), await other.receive(), await other.receive()]

    assert asyncio.run(exchange()) == [{"type": "last"}, None, None]


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
                one.send({"body": "x" * 100_000})
                await one.drain()
                await asyncio.sleep(0)
            return await one.receive()

    assert asyncio.run(exchange()) is None
