"""The process of a replica with an engine that is played: its messages, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import types
from typing import Any, NamedTuple, TypeVar

import pytest

from elbowroom.core.errors import PoolError
from elbowroom.engine import replica
from elbowroom.engine.wire import (
    Channel,
    Failed,
    Message,
    Ready,
    RowAnswer,
    RowFailure,
    RowRequest,
    Start,
    Stats,
    Stop,
    Stopped,
)
from elbowroom.pool.stats import PoolStats
from tests.jobs.plans import make_plan

T = TypeVar("T")


class Reply(NamedTuple):
    status_code: int
    body: Any


class Engine:
    """Answers with what the row's body says."""

    num_kv_tokens = 640
    start_error: Exception | None = None
    health_error: Exception | None = None
    stats_error: Exception | None = None
    is_closed = False

    @classmethod
    async def start(cls, plan: Any, replica: int, run_dir: str) -> Engine:
        if cls.start_error is not None:
            raise cls.start_error
        return cls()

    async def resident_bytes(self) -> int:
        return 99

    async def num_prompt_tokens(self, body: dict[str, Any]) -> int:
        return int(body["prompt_tokens"])

    async def answer(self, url: str, body: dict[str, Any], request_id: str) -> Reply:
        if "raises" in body:
            raise ValueError(body["raises"])
        await asyncio.sleep(body.get("seconds", 0))
        json.dumps(body, allow_nan=False)
        return Reply(body.get("status", 200), {"url": url, "id": request_id})

    async def check_health(self) -> None:
        if self.health_error is not None:
            raise self.health_error

    async def stats(self) -> Stats:
        if self.stats_error is not None:
            raise self.stats_error
        return Stats(0, 0, 0.0, 3, 4, 0, 0, 0, PoolStats(wait_seconds=0.5))

    async def close(self) -> None:
        type(self).is_closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """The engine's class for one test, in place of the module that imports vLLM."""
    played = type("Played", (Engine,), {})
    module = types.ModuleType("server")
    module.Engine = played  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elbowroom.engine.vllm_seam.server", module)
    return played


class Talk(NamedTuple):
    """What the replica said to ``messages``, and its exit status."""

    said: list[Message]
    status: int

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self.said if isinstance(message, kind)]


def _talk(messages: list[Message], seconds: float = 10.0) -> Talk:
    """Send ``messages`` after the start message, and listen until the replica ends."""

    async def talk() -> Talk:
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        task = asyncio.create_task(replica._serve(theirs))
        for message in [Start(make_plan(1), 0, "/none"), *messages]:
            channel.send(message)
        status = await asyncio.wait_for(task, seconds)
        theirs.close()
        ours.shutdown(socket.SHUT_WR)
        said = []
        while True:
            try:
                message = await asyncio.wait_for(channel.receive(), 0.2)
            except TimeoutError:
                break
            if message is None:
                break
            said.append(message)
        channel.close()
        return Talk(said, status)

    return asyncio.run(talk())


def _row(
    index: int,
    max_seconds: float | None = None,
    max_prompt_tokens: int | None = None,
    **body: Any,
) -> RowRequest:
    url, request_id = "/v1/completions", f"req-{index}"
    return RowRequest(index, url, body, request_id, max_seconds, max_prompt_tokens)


STOP = Stop()


def test_rows_are_answered_as_they_finish(engine: type[Engine]) -> None:
    talk = _talk([_row(0, seconds=0.1), _row(1), _row(2, status=400), STOP])
    assert [type(message) for message in talk.said] == [Ready, *[RowAnswer] * 3, Stopped]
    (ready,) = talk.of(Ready)
    assert (ready.num_kv_tokens, ready.resident_bytes) == (640, 99)
    assert [answer.id for answer in talk.of(RowAnswer)] == [1, 2, 0]
    assert [answer.status for answer in talk.of(RowAnswer)] == [200, 400, 200]
    (stopped,) = talk.of(Stopped)
    assert stopped.stats.generation_tokens == 4
    assert stopped.stats.pool == PoolStats(wait_seconds=0.5)
    assert talk.status == 0
    assert engine.is_closed


def test_reports_come_while_rows_run(engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "STATS_SECONDS", 0.05)
    talk = _talk([_row(0, seconds=0.3), STOP])
    assert len(talk.of(Stats)) >= 2


def test_a_start_that_fails_is_told(engine: type[Engine]) -> None:
    engine.start_error = RuntimeError("no memory")
    talk = _talk([_row(0)])
    assert talk.said == [Failed("RuntimeError: no memory")]
    assert talk.status == 1


def test_our_own_errors_speak_for_themselves(engine: type[Engine]) -> None:
    engine.start_error = PoolError("layer 4 needs 1 MiB")
    assert _talk([]).said == [Failed("layer 4 needs 1 MiB")]


def test_a_row_that_takes_too_long_fails_alone(engine: type[Engine]) -> None:
    talk = _talk([_row(0, max_seconds=0.1, seconds=5), _row(1, max_seconds=5), STOP])
    (failure,), (answer,) = talk.of(RowFailure), talk.of(RowAnswer)
    assert (failure.id, failure.code) == (0, "row_timeout")
    assert "no answer within 0.1 s" in failure.message
    assert (answer.id, answer.status) == (1, 200)
    assert talk.status == 0


def test_a_prompt_over_the_limit_is_not_answered(engine: type[Engine]) -> None:
    rows = [_row(n, max_prompt_tokens=10, prompt_tokens=10 + n) for n in range(2)]
    talk = _talk([*rows, STOP])
    (failure,), (answer,) = talk.of(RowFailure), talk.of(RowAnswer)
    assert answer.body["id"] == "req-0"
    assert (failure.id, failure.code) == (1, "limit_exceeded")
    assert "11 tokens, more than --max-prompt-tokens 10" in failure.message


def test_a_server_error_of_one_row_fails_that_row(engine: type[Engine]) -> None:
    talk = _talk([_row(0, status=500), _row(1), STOP])
    assert sorted((m.id, m.status) for m in talk.of(RowAnswer)) == [(0, 500), (1, 200)]
    assert talk.status == 0


def test_an_answer_that_raises_fails_that_row_alone(engine: type[Engine]) -> None:
    """Whatever the client or the application raises for one row: the engine is well."""
    talk = _talk([_row(0, raises="boom"), _row(1), STOP])
    assert sorted((m.id, m.status) for m in talk.of(RowAnswer)) == [(0, 500), (1, 200)]
    assert talk.status == 0


@pytest.mark.parametrize("what", ["health_error", "stats_error"])
def test_an_engine_that_is_dead_ends_the_replica(
    engine: type[Engine], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(replica, "STATS_SECONDS", 0.05)
    setattr(engine, what, RuntimeError("EngineCore died"))
    talk = _talk([_row(0, status=500), _row(1, seconds=0.5)])
    assert talk.said[-1] == Failed("RuntimeError: EngineCore died")
    assert talk.status == 1


def test_a_runner_that_goes_before_the_start() -> None:
    async def go() -> int:
        ours, theirs = socket.socketpair()
        ours.close()
        return await asyncio.wait_for(replica._serve(theirs), 5)

    assert asyncio.run(go()) == 1


def test_a_runner_that_does_not_begin_with_the_start(engine: type[Engine]) -> None:
    async def go() -> tuple[int, Message | None]:
        ours, theirs = socket.socketpair()
        channel = await Channel.over(ours)
        channel.send(STOP)
        status = await asyncio.wait_for(replica._serve(theirs), 5)
        said = await channel.receive()
        channel.close()
        return status, said

    assert asyncio.run(go()) == (1, Failed("MessageError: Start comes first, not Stop"))
