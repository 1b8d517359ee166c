"""The replicas of one run: started together, heard through one queue, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from elbowroom.engine.launch import (
    REPLICA_COMMAND,
    ReplicaProcess,
    remove_openmp_leftovers,
    start_replica,
)
from elbowroom.engine.wire import Message
from elbowroom.plans.pool import RunPlan

_LOG_TAIL_LINES = 15
_GRACE_SECONDS = 3.0  # for a replica to end after each step of ending it
_LAST_WORDS_SECONDS = 1.0  # the same for one that has closed its channel
_POLL_SECONDS = 0.05


class Event(NamedTuple):
    """A message from a replica, or ``{"type": "died", "reason": ...}`` about it."""

    rank: int
    message: Message


class ReplicaGroup:
    """Owns the replica processes of a run. Use as an async context manager.

    One task per replica listens to its channel and feeds the queue behind ``next_event``; the end
    of a channel is an event too, so a replica that dies is noticed at once. A rank whose replica
    died may be started again.
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
        self._replicas: dict[int, ReplicaProcess] = {}
        self._listeners: set[asyncio.Task[None]] = set()
        self._ready: set[int] = set()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def __aenter__(self) -> ReplicaGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        """End whatever still runs, children included, and wait until it is gone."""
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)
        await asyncio.gather(
            *(
                _end(replica, listens=rank in self._ready)
                for rank, replica in self._replicas.items()
            )
        )
        remove_openmp_leftovers()

    async def start(self, rank: int) -> None:
        """Start the replica of a rank that has none. Its log goes on where the last one ended."""
        with open(self._log_path(rank), "ab", opener=_private) as log:
            replica = await start_replica(rank, self._plan.cores[rank], log, self._command)
        self._replicas[rank] = replica
        self._ready.discard(rank)
        listener = asyncio.create_task(self._listen(replica))
        self._listeners.add(listener)
        listener.add_done_callback(self._listeners.discard)
        start = {"plan": self._plan.to_json(), "rank": rank, "run_dir": str(self._run_dir)}
        self.send(rank, {"type": "start", **start})

    def send(self, rank: int, message: Message) -> None:
        """To a replica that has died meanwhile nothing is sent: its death is an event."""
        if (replica := self._replicas.get(rank)) is not None:
            replica.channel.send(message)

    async def drain(self) -> None:
        for replica in list(self._replicas.values()):
            await replica.channel.drain()

    async def next_event(self, timeout_seconds: float) -> Event | None:
        """The next message, or None after the time-out."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout_seconds)
        except TimeoutError:
            return None

    async def _listen(self, replica: ReplicaProcess) -> None:
        """Pass on what a replica says, until it has ended and all its children are gone."""
        reason, has_stopped = "", False
        with suppress(ValueError):  # what is no message ends the talk
            while (message := await replica.channel.receive()) is not None:
                if message["type"] == "failed":
                    reason = f"failed: {message['error']}"
                else:
                    has_stopped = has_stopped or message["type"] == "stopped"
                    if message["type"] == "ready":
                        self._ready.add(replica.rank)
                    self._events.put_nowait(Event(replica.rank, message))
        if has_stopped:
            return  # it ends as it was told to
        await _end(replica, grace_seconds=_LAST_WORDS_SECONDS)
        del self._replicas[replica.rank]
        died = {"type": "died", "reason": reason or _how_it_ended(replica)}
        died["reason"] += self._log_tail(replica.rank)
        self._events.put_nowait(Event(replica.rank, died))

    def _log_path(self, rank: int) -> Path:
        return self._log_dir / f"replica-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        text = self._log_path(rank).read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()[-_LOG_TAIL_LINES:]
        return "".join(f"\n  | {line}" for line in lines)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _how_it_ended(replica: ReplicaProcess) -> str:
    code = replica.process.returncode or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


async def _end(
    replica: ReplicaProcess, grace_seconds: float = _GRACE_SECONDS, *, listens: bool = True
) -> None:
    """End a replica's process group: the replica leads it, its engine core is in it.

    A replica that was told to stop ends by itself, unless it is still starting and does not listen.
    SIGTERM comes next, which leaves Python's resource tracker time to remove semaphores, and
    SIGKILL for whatever is left.
    """
    replica.channel.close()
    for sign in (
        (None, signal.SIGTERM, signal.SIGKILL) if listens else (signal.SIGTERM, signal.SIGKILL)
    ):
        if sign is not None:
            _signal_group(replica.process.pid, sign)
        deadline = time.monotonic() + grace_seconds
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
