"""The replicas of one run: started together, heard through one queue, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from elbowroom.core.errors import ReplicaError
from elbowroom.core.plan import RunPlan
from elbowroom.engine.launch import (
    REPLICA_COMMAND,
    ReplicaProcess,
    remove_openmp_leftovers,
    start_replica,
)
from elbowroom.engine.wire import Message

_LOG_TAIL_LINES = 15
_GRACE_SECONDS = 5.0  # for a replica to end after each step of ending it
_POLL_SECONDS = 0.05


class Event(NamedTuple):
    """A message from a replica."""

    rank: int
    message: Message


class ReplicaGroup:
    """Owns the replica processes of a run. Use as an async context manager.

    One task per replica listens to its channel and feeds the queue behind ``next_event``; the end
    of a channel is an event too, so a replica that dies is noticed at once.
    """

    def __init__(
        self,
        plan: RunPlan,
        run_dir: Path,
        log_dir: Path,
        command: Sequence[str] = REPLICA_COMMAND,
    ) -> None:
        self._plan = plan
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._command = command
        self._replicas: list[ReplicaProcess] = []
        self._stopped: set[int] = set()
        self._listeners: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[tuple[int, Message | None]] = asyncio.Queue()

    async def __aenter__(self) -> ReplicaGroup:
        try:
            for rank, cores in enumerate(self._plan.cores):
                with self._log_path(rank).open("wb") as log:
                    replica = await start_replica(rank, cores, log, self._command)
                self._replicas.append(replica)
                self._listeners.append(asyncio.create_task(self._listen(replica)))
                self.send(
                    rank,
                    {
                        "type": "start",
                        "plan": self._plan.to_json(),
                        "rank": rank,
                        "run_dir": str(self._run_dir),
                    },
                )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End whatever still runs, children included, and wait until it is gone."""
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*(_end(replica) for replica in self._replicas))
        remove_openmp_leftovers()

    def send(self, rank: int, message: Message) -> None:
        self._replicas[rank].channel.send(message)

    async def drain(self) -> None:
        for replica in self._replicas:
            await replica.channel.drain()

    async def next_event(self, timeout_seconds: float) -> Event | None:
        """The next message, or None after the time-out.

        Raises ReplicaError when a replica failed or died, with the end of its log.
        """
        try:
            rank, message = await asyncio.wait_for(self._events.get(), timeout_seconds)
        except TimeoutError:
            return None
        if message is None:
            if rank in self._stopped:
                return None  # it ended as it was told to
            await self._raise_dead(rank)
        assert message is not None
        if message["type"] == "stopped":
            self._stopped.add(rank)
        if message["type"] == "failed":
            raise ReplicaError(f"replica {rank} failed: {message['error']}{self._log_tail(rank)}")
        return Event(rank, message)

    async def _listen(self, replica: ReplicaProcess) -> None:
        try:
            while (message := await replica.channel.receive()) is not None:
                await self._events.put((replica.rank, message))
        finally:  # also when it sends what is no message
            await self._events.put((replica.rank, None))

    async def _raise_dead(self, rank: int) -> None:
        await _end(self._replicas[rank])
        code = self._replicas[rank].process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raise ReplicaError(f"replica {rank} {how}{self._log_tail(rank)}")

    def _log_path(self, rank: int) -> Path:
        return self._log_dir / f"replica-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        text = self._log_path(rank).read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()[-_LOG_TAIL_LINES:]
        return "".join(f"\n  | {line}" for line in lines)


async def _end(replica: ReplicaProcess) -> None:
    """End a replica's process group: the replica leads it, its engine core is in it.

    A replica that was told to stop ends by itself. SIGTERM comes next, which leaves Python's
    resource tracker time to remove semaphores, and SIGKILL for whatever is left.
    """
    replica.channel.close()
    for sign in (None, signal.SIGTERM, signal.SIGKILL):
        if sign is not None:
            _signal_group(replica.process.pid, sign)
        deadline = time.monotonic() + _GRACE_SECONDS
        while _signal_group(replica.process.pid, 0) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
    await replica.process.wait()


def _signal_group(leader: int, sign: int) -> bool:
    """Send ``sign`` to a process group; 0 only asks. False when the group is gone."""
    try:
        os.killpg(leader, sign)
    except ProcessLookupError:
        return False
    return True
