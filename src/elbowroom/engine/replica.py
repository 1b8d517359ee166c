"""The process of one replica: it answers rows that the runner sends, and reports how it fares."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING

from elbowroom.core import host
from elbowroom.core.errors import ElbowroomError
from elbowroom.engine.process import tie_children
from elbowroom.engine.wire import (
    Channel,
    Failed,
    MessageError,
    Ready,
    RowAnswer,
    RowFailure,
    RowRequest,
    Start,
    Stopped,
)

if TYPE_CHECKING:
    from elbowroom.engine.vllm_seam.server import Engine

STATS_SECONDS = 0.5
"""Time between two reports to the runner."""


def main(descriptor: int) -> None:
    """Serve the socket ``descriptor`` until the runner says stop or goes away."""
    host.die_with_parent()
    tie_children()
    sys.exit(asyncio.run(_serve(socket.socket(fileno=descriptor))))


async def _serve(sock: socket.socket) -> int:
    channel = await Channel.over(sock)
    try:
        start = await channel.receive()
        if start is None:
            return 1
        if not isinstance(start, Start):
            raise MessageError(f"Start comes first, not {type(start).__name__}")
        engine = await _start_engine(start, channel)
        await _answer_rows(engine, channel)
        channel.send(Stopped(await engine.stats()))
        await channel.drain()
        await engine.close()
    except Exception as error:  # whatever vLLM raises; the runner prints it and ends the run
        traceback.print_exc()
        channel.send(Failed(describe(error)))
        await channel.drain()
        return 1
    return 0


async def _start_engine(start: Start, channel: Channel) -> Engine:
    # Imported here, not above: it takes seconds, and what fails in it must reach the runner.
    from elbowroom.engine.vllm_seam.server import Engine

    begin = time.perf_counter()
    engine = await Engine.start(start.plan, start.replica, start.run_dir)
    ready = Ready(
        num_kv_tokens=engine.num_kv_tokens,
        resident_bytes=await engine.resident_bytes(),
        start_seconds=time.perf_counter() - begin,
    )
    channel.send(ready)
    await channel.drain()
    return engine


async def _answer_rows(engine: Engine, channel: Channel) -> None:
    """Answer every row that comes, all at once, until the runner says stop.

    Whatever fails in a task, the reports included, ends all of them and is raised.
    """
    async with asyncio.TaskGroup() as tasks:
        reporter = tasks.create_task(_report(engine, channel))
        async with asyncio.TaskGroup() as rows:
            while isinstance(message := await channel.receive(), RowRequest):
                rows.create_task(_answer(engine, channel, message))
            if message is None:  # the runner died: nobody wants the rows in flight
                os._exit(1)
        reporter.cancel()


async def _answer(engine: Engine, channel: Channel, row: RowRequest) -> None:
    answer: RowAnswer | RowFailure
    try:
        async with asyncio.timeout(row.max_seconds):
            answer = await _ask(engine, row)
    except TimeoutError:
        message = f"no answer within {row.max_seconds:g} s: raise --max-row-seconds"
        answer = RowFailure(row.id, "row_timeout", message)
    except Exception as error:  # of this row alone, if the engine is well
        body = {"error": {"message": describe(error), "type": "InternalServerError"}}
        answer = RowAnswer(row.id, 500, body)
    if isinstance(answer, RowAnswer) and answer.status >= 500:
        await engine.check_health()  # a dead engine ends the replica, not row after row
    channel.send(answer)
    await channel.drain()


async def _ask(engine: Engine, row: RowRequest) -> RowAnswer | RowFailure:
    """Ask the engine, if the prompt is not too long."""
    most = row.max_prompt_tokens
    if most is not None and (count := await engine.num_prompt_tokens(row.body)) > most:
        message = f"the prompt has {count} tokens, more than --max-prompt-tokens {most}"
        return RowFailure(row.id, "limit_exceeded", message)
    reply = await engine.answer(row.url, row.body, row.request_id)
    return RowAnswer(row.id, reply.status_code, reply.body)


async def _report(engine: Engine, channel: Channel) -> None:
    while True:
        await asyncio.sleep(STATS_SECONDS)
        channel.send(await engine.stats())


def describe(error: BaseException) -> str:
    """One line for the runner: our own errors speak for themselves, others give their type."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ElbowroomError):
        return str(error)
    return f"{type(error).__name__}: {error}"
