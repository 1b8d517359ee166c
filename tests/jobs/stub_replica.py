"""Speaks the protocol of ``elbowroom.engine.replica`` without an engine: answers with the prompt.

    python -m tests.jobs.stub_replica [options] DESCRIPTOR

Options about rows or misbehaviour hold for the replica given by ``--replica``, or for every one.
Every process adds its id to ``PIDS/REPLICA`` once it knows its number. Needs no import of torch or
vLLM, so that it starts fast.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from elbowroom.core.host import die_with_parent
from elbowroom.engine.wire import (
    Channel,
    Failed,
    Ready,
    RowAnswer,
    RowRequest,
    Start,
    Stats,
    Stopped,
)
from elbowroom.pool.stats import PoolStats


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("descriptor", type=int)
    parser.add_argument("--pids", type=Path)
    parser.add_argument("--replica", type=int, help="the one that misbehaves")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per row")
    parser.add_argument("--killed-after", type=int, help="SIGKILL after so many rows")
    parser.add_argument("--killer", action="append", default=[], help="SIGKILL on this prompt")
    parser.add_argument("--log", type=Path, help="every answered row's id is added to it")
    parser.add_argument("--core", action="store_true", help="has a child, and dies when that does")
    parser.add_argument(
        "--anonymous", action="store_true", help="answers do not tell who gave them"
    )
    parser.add_argument("--lives", type=int, default=1, help="in which it misbehaves")
    parser.add_argument("--fails", help="says failed with this text instead of ready")
    parser.add_argument("--crashes", help="prints this text and exits instead of being ready")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--dies-at-start", action="store_true", help="SIGKILL before it is ready")
    parser.add_argument("--refuses", type=int, default=0, help="400 for each so-manieth row")
    parser.add_argument(
        "--deaf", action="store_true", help="ignores SIGTERM and its closed channel"
    )
    parser.add_argument("--stop-seconds", type=float, default=0.0, help="between stop and stopped")
    parser.add_argument("--resident-bytes", type=int, default=0)
    return parser.parse_args()


class Stub:
    """One replica. Rows are answered in an order of their own: later rows of a pair first."""

    def __init__(
        self, options: argparse.Namespace, channel: Channel, number: int, life: int
    ) -> None:
        self.options = options
        self.channel = channel
        self.number = number
        self.is_odd_one = options.replica in (None, number) and life <= options.lives
        self.num_answered = 0

    async def serve(self) -> int:
        options = self.options
        if self.is_odd_one and options.deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.is_odd_one and options.fails:
            self.channel.send(Failed(options.fails))
            await self.channel.drain()
            return 1
        if self.is_odd_one and options.crashes:
            print(options.crashes, flush=True)
            return 3
        if self.is_odd_one and options.dies_at_start:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.is_odd_one and options.never_ready:
            await asyncio.sleep(3600)
        self.channel.send(Ready(1000, options.resident_bytes, start_seconds=0.1))
        if options.core:
            self.core_watch = asyncio.create_task(self.watch(await self.start_core()))
        async with asyncio.TaskGroup() as rows:
            while isinstance(message := await self.channel.receive(), RowRequest):
                if options.latency:
                    rows.create_task(self.answer(message))
                else:
                    await self.answer(message)
            if message is None:  # as the replica does: nobody wants the rows in flight
                if self.is_odd_one and options.deaf:
                    time.sleep(3600)
                os._exit(1)
        await asyncio.sleep(options.stop_seconds if self.is_odd_one else 0)
        self.channel.send(Stopped(_stats(self.num_answered)))
        await self.channel.drain()
        return 0

    async def start_core(self) -> asyncio.subprocess.Process:
        """A child in the place of vLLM's engine core: it does nothing but be there."""
        code = "from elbowroom.core.host import die_with_parent as d; d(); input()"
        core = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=asyncio.subprocess.PIPE
        )
        (self.options.pids / f"core-{self.number}").write_text(str(core.pid))
        return core

    async def watch(self, core: asyncio.subprocess.Process) -> None:
        await core.wait()
        self.channel.send(Failed("EngineCore died"))
        await self.channel.drain()
        os._exit(1)

    async def answer(self, row: RowRequest) -> None:
        if self.options.latency:
            await asyncio.sleep(self.options.latency * (2 if row.id % 2 == 0 else 1))
        if self.is_odd_one and row.body.get("prompt") in self.options.killer:
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_answered += 1
        if self.options.log:
            with self.options.log.open("a") as log:
                log.write(f"{row.id}\n")
        if self.is_odd_one and self.num_answered == self.options.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        refused = self.options.refuses and (row.id + 1) % self.options.refuses == 0
        status = 400 if refused else 200
        self.channel.send(RowAnswer(row.id, status, self.body(row, status)))
        await self.channel.drain()

    def body(self, row: RowRequest, status: int) -> dict[str, Any]:
        if status != 200:
            return {"error": {"message": "no", "code": status}}
        usage = {"prompt_tokens": 4, "completion_tokens": 2}
        number = None if self.options.anonymous else self.number
        return {"text": row.body.get("prompt"), "replica": number, "usage": usage}


def _stats(num_answered: int) -> Stats:
    return Stats(
        num_requests_running=0,
        num_requests_waiting=0,
        kv_cache_usage=0.5,
        prompt_tokens=4 * num_answered,
        generation_tokens=2 * num_answered,
        num_preemptions=0,
        prefix_query_tokens=4 * num_answered,
        prefix_hit_tokens=num_answered,
        pool=PoolStats(mapped_bytes=7, streamed_bytes=11, wait_seconds=0.25),
    )


async def main() -> int:
    options = _options()
    channel = await Channel.over(socket.socket(fileno=options.descriptor))
    start = await channel.receive()
    if not isinstance(start, Start):
        return 1
    life = 1
    if options.pids:
        with (options.pids / str(start.replica)).open("a+") as lives:
            lives.write(f"{os.getpid()}\n")
            lives.seek(0)
            life = len(lives.readlines())
    return await Stub(options, channel, start.replica, life).serve()


if __name__ == "__main__":
    die_with_parent()
    sys.exit(asyncio.run(main()))
