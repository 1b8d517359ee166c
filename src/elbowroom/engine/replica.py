"""The process of one replica: it answers rows that the runner sends, and reports how it fares.

From the runner: ``start`` (plan, rank, run directory), ``row`` (id, url, body, limits), ``stop``.
To the runner: ``ready`` (KV tokens, memory), ``done`` (id, and status and body, or our error),
``stats``, ``stopped`` (the last counters) and ``failed``.
"""

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
from elbowroom.engine.wire import Channel, Message
from elbowroom.plans.pool import RunPlan

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
    start = await channel.receive()
    if start is None:
        return 1
    try:
        engine = await _start_engine(start, channel)
        await _answer_rows(engine, channel)
        channel.send({**await _stats(engine), "type": "stopped"})
        await channel.drain()
        await engine.close()
    except Exception as error:  # whatever vLLM raises; the runner prints it and ends the run
        traceback.print_exc()
        channel.send({"type": "failed", "error": describe(error)})
        await channel.drain()
        return 1
    return 0


async def _start_engine(start: Message, channel: Channel) -> Engine:
    # Imported here, not above: it takes seconds, and what fails in it must reach the runner.
    from elbowroom.engine.vllm_seam.server import Engine

    begin = time.perf_counter()
    plan = RunPlan.from_json(start["plan"])
    engine = await Engine.start(plan, start["rank"], start["run_dir"])
    ready = {
        "type": "ready",
        "num_kv_tokens": engine.num_kv_tokens,
        "resident_bytes": await engine.resident_bytes(),
        "start_seconds": time.perf_counter() - begin,
    }
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
            while (message := await channel.receive()) is not None and message["type"] == "row":
                rows.create_task(_answer(engine, channel, message))
            if message is None:  # the runner died: nobody wants the rows in flight
                os._exit(1)
        reporter.cancel()


async def _answer(engine: Engine, channel: Channel, row: Message) -> None:
    try:
        async with asyncio.timeout(row["max_seconds"]):
            done = await _done(engine, row)
    except TimeoutError:
        message = f"no answer within {row['max_seconds']:g} s: raise --max-row-seconds"
        done = {"error": {"code": "row_timeout", "message": message}}
    except Exception as error:  # of this row alone, if the engine is well
        body = {"error": {"message": describe(error), "type": "InternalServerError"}}
        done = {"status": 500, "body": body}
    if done.get("status", 0) >= 500:
        await engine.check_health()  # a dead engine ends the replica, not row after row
    channel.send({"type": "done", "id": row["id"], **done})
    await channel.drain()


async def _done(engine: Engine, row: Message) -> Message:
    """Ask the engine, if the prompt is not too long."""
    most = row["max_prompt_tokens"]
    if most is not None and (count := await engine.num_prompt_tokens(row["body"])) > most:
        message = f"the prompt has {count} tokens, more than --max-prompt-tokens {most}"
        return {"error": {"code": "limit_exceeded", "message": message}}
    reply = await engine.answer(row["url"], row["body"], row["request_id"])
    return {"status": reply.status_code, "body": reply.body}


async def _report(engine: Engine, channel: Channel) -> None:
    while True:
        await asyncio.sleep(STATS_SECONDS)
        channel.send(await _stats(engine))


async def _stats(engine: Engine) -> Message:
    return {
        "type": "stats",
        **engine.counters()._asdict(),
        "pool": await engine.pool_stats(),
    }


def describe(error: BaseException) -> str:
    """One line for the runner: our own errors speak for themselves, others give their type."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ElbowroomError):
        return str(error)
    return f"{type(error).__name__}: {error}"
