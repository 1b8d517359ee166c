"""The lives of a run's replicas: started, heard, started again when they die, and ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from elbowroom.core.errors import ReplicaError
from elbowroom.core.units import MIB, format_bytes
from elbowroom.engine.wire import Ready, RowAnswer, RowFailure, RowRequest, Stats, Stop, Stopped
from elbowroom.jobs.group import Died, ReplicaGroup
from elbowroom.jobs.progress import ReplicaStats
from elbowroom.jobs.report import ReplicaReport
from elbowroom.jobs.restarts import RestartPolicy
from elbowroom.plans.pool import RunPlan

MEMORY_TOLERANCE = 0.05
_MEMORY_SLACK_BYTES = 64 * MIB  # the interpreter's own growth, which matters to tiny models only
_POLL_SECONDS = 0.25


class Joined(NamedTuple):
    """Event: a replica has started, for the first time or again, and takes rows."""

    replica: int
    num_kv_tokens: int


class Answered(NamedTuple):
    """Event: a replica has answered a row, or failed it."""

    replica: int
    answer: RowAnswer | RowFailure


class Lost(NamedTuple):
    """Event: a replica has died. ``Fleet.bury`` decides whether it is started again."""

    replica: int
    reason: str


FleetEvent = Joined | Answered | Lost


class Fate(NamedTuple):
    """Decision about a replica that died, and whether it ends the job."""

    text: str
    ends_job: bool


class Replica:
    """One replica over all its lives: what it last said, and when it is started again.

    ``stats`` are counted over its lives; a row that it finishes makes up for an earlier death.
    """

    def __init__(self, number: int, policy: RestartPolicy) -> None:
        self.number = number
        self.stats = ReplicaStats(number, "starting")
        self.was_ready = False
        self.restart_at: float | None = None
        self.policy = policy
        self._stats_before = self.stats  # of earlier lives
        self._num_restarts = 0
        self._last_ready = Ready(num_kv_tokens=0, resident_bytes=0, start_seconds=0.0)

    @property
    def is_lost(self) -> bool:
        return self.stats.state == "lost"

    @property
    def resident_bytes(self) -> int:
        return self._last_ready.resident_bytes

    def hear(
        self, message: Ready | RowAnswer | RowFailure | Stats | Stopped
    ) -> Joined | Answered | None:
        """Take note of a message. Returns what it means for rows, if anything."""
        match message:
            case Ready():
                self.was_ready = True
                self._last_ready = message
                self.stats = replace(self.stats, state="running")
                return Joined(self.number, message.num_kv_tokens)
            case RowAnswer() | RowFailure():
                self.policy.finished_row()
                return Answered(self.number, message)
            case Stats():
                self.stats = self._over_all_lives("running", message)
            case Stopped(stats):
                self.stats = self._over_all_lives("stopped", stats)
        return None

    def died(self, among_suspects: bool, num_killers: int) -> float | None:
        """Record a death. Returns seconds until the next start; None when the replica is given up.

        ``num_killers`` of its rows were found to kill: the deaths that made them suspects are
        excused.
        """
        for _ in range(num_killers):
            self.policy.excuse()
        delay = self.policy.died(among_suspects)
        state = "lost" if delay is None else "restarting"
        self._stats_before = self.stats
        self.stats = replace(self.stats, state=state, num_running=0, num_waiting=0, kv_usage=0.0)
        self.restart_at = None if delay is None else time.monotonic() + delay
        return delay

    def restarts(self) -> None:
        """Record that the replica is started again now."""
        self.restart_at = None
        self._num_restarts += 1
        self.stats = replace(self.stats, state="starting")

    def report(self) -> ReplicaReport:
        return ReplicaReport(
            replica=self.number,
            num_kv_tokens=self._last_ready.num_kv_tokens,
            resident_bytes=self._last_ready.resident_bytes,
            start_seconds=self._last_ready.start_seconds,
            num_restarts=self._num_restarts,
            num_preemptions=self.stats.num_preemptions,
            prefix_query_tokens=self.stats.prefix_query_tokens,
            prefix_hit_tokens=self.stats.prefix_hit_tokens,
            pool=self.stats.pool,
        )

    def _over_all_lives(self, state: str, now: Stats) -> ReplicaStats:
        before = self._stats_before
        return ReplicaStats(
            replica=self.number,
            state=state,
            num_running=now.num_requests_running,
            num_waiting=now.num_requests_waiting,
            kv_usage=now.kv_cache_usage,
            prompt_tokens=before.prompt_tokens + now.prompt_tokens,
            generation_tokens=before.generation_tokens + now.generation_tokens,
            num_preemptions=before.num_preemptions + now.num_preemptions,
            prefix_query_tokens=before.prefix_query_tokens + now.prefix_query_tokens,
            prefix_hit_tokens=before.prefix_hit_tokens + now.prefix_hit_tokens,
            pool=now.pool.after(before.pool),
        )


def new_replicas(plan: RunPlan, max_restarts: int) -> tuple[Replica, ...]:
    """The replicas of a plan before their first start."""
    return tuple(
        Replica(number, RestartPolicy(max_restarts)) for number in range(plan.num_replicas)
    )


class Fleet:
    """Starts and hears the replicas of a run. Their processes are the group's."""

    def __init__(self, plan: RunPlan, replicas: Sequence[Replica], group: ReplicaGroup) -> None:
        self._plan = plan
        self._replicas = replicas
        self._group = group

    @property
    def is_starting(self) -> bool:
        """Whether a replica that is not given up has yet to become ready for the first time."""
        return any(not replica.was_ready and not replica.is_lost for replica in self._replicas)

    @property
    def stats(self) -> tuple[ReplicaStats, ...]:
        return tuple(replica.stats for replica in self._replicas)

    async def start(self) -> None:
        for replica in self._replicas:
            await self._group.start(replica.number)

    async def send(self, replica: int, row: RowRequest) -> None:
        """Hand a row to a replica, and wait while replicas have too much to read."""
        self._group.send(replica, row)
        await self._group.drain()

    async def next_event(self, timeout_seconds: float) -> FleetEvent | None:
        """Hear one message. None when it does not concern rows, or none came in time.

        Raises ReplicaError for a replica that never worked: it would fail the same way again. One
        that was killed might not.
        """
        event = await self._group.next_event(timeout_seconds)
        if event is None:
            return None
        replica, message = self._replicas[event.replica], event.message
        if not isinstance(message, Died):
            return replica.hear(message)
        if not replica.was_ready and not message.was_killed:
            raise ReplicaError(f"replica {replica.number} {message.reason}")
        return Lost(replica.number, message.reason)

    def bury(self, lost: Lost, among_suspects: bool, num_killers: int) -> Fate:
        """Decide whether a replica that died is started again.

        ``num_killers`` of its rows were found to kill; ``among_suspects`` it held only rows that
        may have killed before.
        """
        replica = self._replicas[lost.replica]
        what = f"replica {lost.replica} {lost.reason}"
        delay = replica.died(among_suspects, num_killers)
        if delay is not None:
            return Fate(f"{what}\nit is started again in {delay:.0f} s", ends_job=False)
        gone = f"{what}\nit died more than {replica.policy.max_restarts} times and is given up"
        if not replica.was_ready and self._plan.shares[lost.replica].mode != "none":
            return Fate(f"{gone}: its layers are missing in the pool", ends_job=True)
        if all(other.is_lost for other in self._replicas):
            return Fate(f"{gone}, as all others were", ends_job=True)
        return Fate(f"{gone}; the others continue", ends_job=False)

    async def restart_due(self) -> None:
        """Start the replicas again whose pause is over."""
        for replica in self._replicas:
            if replica.restart_at is not None and time.monotonic() >= replica.restart_at:
                replica.restarts()
                await self._group.start(replica.number)

    async def stop(self) -> None:
        """Let every replica end by itself and send its last counters. No row is lost any more."""
        waiting = {stats.replica for stats in self.stats if stats.state == "running"}
        for replica in waiting:
            self._group.send(replica, Stop())
        while waiting:
            event = await self._group.next_event(_POLL_SECONDS)
            if event is None:
                continue
            if isinstance(event.message, Stopped | Died):
                waiting.discard(event.replica)
            if not isinstance(event.message, Died):
                self._replicas[event.replica].hear(event.message)

    def memory_warnings(self) -> Iterator[str]:
        """Warnings about replicas that hold more or less than their memory budget says."""
        budget = self._plan.budget
        expected = budget.weight_bytes + budget.slot_bytes
        for replica in self._replicas:
            held, difference = replica.resident_bytes, replica.resident_bytes - expected
            if held and abs(difference) > max(MEMORY_TOLERANCE * expected, _MEMORY_SLACK_BYTES):
                yield (
                    f"warning: replica {replica.number} holds {format_bytes(held)} of weights "
                    f"and slots, the memory budget says {format_bytes(expected)}"
                )
