"""The replicas of one run: started together, heard through one queue, and never left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from elbowroom.core.gpus import Gpu, find_gpus, in_order_of
from elbowroom.engine.launch import (
    REPLICA_COMMAND,
    ReplicaProcess,
    remove_openmp_leftovers,
    start_replica,
)
from elbowroom.engine.wire import (
    Failed,
    MessageError,
    Ready,
    RowAnswer,
    RowFailure,
    Start,
    Stats,
    Stopped,
    ToReplica,
)
from elbowroom.jobs.identity import engine_version, is_for_gpus
from elbowroom.plans.pool import RunPlan

_LOG_TAIL_LINES = 15
_LOGGED_ERROR = re.compile(r"\bERROR .*?\] ((?:\w+\.)*\w+(?:Error|Exception): .+)")
"""The end of a traceback in a log of vLLM, which has a time and a place before each line."""

_GRACE_SECONDS = 3.0  # for a replica to end after each step of ending it
_LAST_WORDS_SECONDS = 1.0  # the same for one that has closed its channel
_POLL_SECONDS = 0.05


class Died(NamedTuple):
    """End of a replica that was not told to. ``reason`` ends with what its log says."""

    reason: str
    was_killed: bool


class Event(NamedTuple):
    """Message from a replica, or its death."""

    replica: int
    message: Ready | RowAnswer | RowFailure | Stats | Stopped | Died


class ReplicaGroup:
    """Owns the replica processes of a run. Use as an async context manager.

    One task per replica listens to its channel and feeds the queue behind ``next_event``; the end
    of a channel is an event too, so a replica that dies is noticed at once. One that died may be
    started again.
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
        self._gpus = find_gpus() if is_for_gpus(engine_version()) else ()
        self._processes: dict[int, ReplicaProcess] = {}
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
                _end(process, listens=replica in self._ready)
                for replica, process in self._processes.items()
            )
        )
        remove_openmp_leftovers()

    async def start(self, replica: int) -> None:
        """Start a replica that does not run. Its log is appended to."""
        with open(self._log_path(replica), "ab", opener=_private) as log:
            process = await start_replica(
                replica, self._plan.cores[replica], log, self._command, self._gpus_of(replica)
            )
        self._processes[replica] = process
        self._ready.discard(replica)
        listener = asyncio.create_task(self._listen(process))
        self._listeners.add(listener)
        listener.add_done_callback(self._listeners.discard)
        self.send(replica, Start(self._plan, replica, str(self._run_dir)))

    def _gpus_of(self, replica: int) -> tuple[Gpu, ...]:
        """The GPUs that an engine for GPUs computes on, and those of its peers."""
        layout = self._plan.layout
        width = layout.tensor_parallel if layout else 1
        return in_order_of(replica, width, self._gpus) if self._gpus else ()

    def send(self, replica: int, message: ToReplica) -> None:
        """Send, unless the replica has died meanwhile: its death is an event."""
        if (process := self._processes.get(replica)) is not None:
            process.channel.send(message)

    async def drain(self) -> None:
        for process in list(self._processes.values()):
            await process.channel.drain()

    async def next_event(self, timeout_seconds: float) -> Event | None:
        """The next message, or None after the time-out."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout_seconds)
        except TimeoutError:
            return None

    async def _listen(self, process: ReplicaProcess) -> None:
        """Pass on what a replica says, until it has ended and all its children are gone."""
        replica, reason, has_stopped = process.replica, "", False
        try:
            while (message := await process.channel.receive()) is not None:
                match message:
                    case Failed(error):
                        reason = f"failed: {error}"
                        continue
                    case Ready():
                        self._ready.add(replica)
                    case Stopped():
                        has_stopped = True
                    case RowAnswer() | RowFailure() | Stats():
                        pass
                    case _:
                        raise MessageError(f"{type(message).__name__} is for replicas")
                self._events.put_nowait(Event(replica, message))
        except MessageError as error:  # nothing that comes behind it can be trusted
            reason = f"failed: it sent {error}"
        if has_stopped:
            return  # it ends as it was told to
        await _end(process, grace_seconds=_LAST_WORDS_SECONDS)
        del self._processes[replica]
        code = process.process.returncode or 0
        how = reason or _how_it_ended(code)
        died = Died(how + self._of_log(replica), was_killed=not reason and code < 0)
        self._events.put_nowait(Event(replica, died))

    def _log_path(self, replica: int) -> Path:
        return self._log_dir / f"replica-{replica}.log"

    def _of_log(self, replica: int) -> str:
        """The error that an engine's processes logged last, or the end of the log, and its name.

        What the replica itself raises is often only that its engine did not start.
        """
        path = self._log_path(replica)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        causes = [match[1] for line in lines if (match := _LOGGED_ERROR.search(line))]
        shown = causes[-1:] or lines[-_LOG_TAIL_LINES:]
        return "".join(f"\n  | {line}" for line in shown) + f"\n  its log: {path}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


async def _end(
    process: ReplicaProcess, grace_seconds: float = _GRACE_SECONDS, *, listens: bool = True
) -> None:
    """End a replica's process group: the replica leads it, its engine core is in it.

    A replica that was told to stop ends by itself, unless it is still starting and does not listen.
    SIGTERM comes next, which leaves Python's resource tracker time to remove semaphores, and
    SIGKILL for whatever is left.
    """
    process.channel.close()
    for sign in (
        (None, signal.SIGTERM, signal.SIGKILL) if listens else (signal.SIGTERM, signal.SIGKILL)
    ):
        if sign is not None:
            _signal_group(process.process.pid, sign)
        deadline = time.monotonic() + grace_seconds
        while _signal_group(process.process.pid, 0) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
    await process.process.wait()


def _signal_group(leader: int, sign: int) -> bool:
    """Send ``sign`` to a process group; 0 only asks. False when the group is gone."""
    try:
        os.killpg(leader, sign)
    except ProcessLookupError:
        return False
    return True
