"""The lives of replicas with a group that is played: what is heard, restarted, given up."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import ReplicaError
from elbowroom.engine.wire import Message, Ready, RowAnswer, RowFailure, Stats, Stop, Stopped
from elbowroom.jobs.fleet import Answered, Fleet, FleetEvent, Joined, Lost, new_replicas
from elbowroom.jobs.group import Died, Event, ReplicaGroup
from elbowroom.plans.pool import PoolMode
from elbowroom.pool.stats import PoolStats
from tests.jobs.plans import make_plan

READY = Ready(num_kv_tokens=1000, resident_bytes=0, start_seconds=0.5)
KILLED = Died("was killed by SIGKILL", was_killed=True)


def _stats(num_tokens: int) -> Stats:
    return Stats(
        1, 2, 0.5, num_tokens, num_tokens, 0, 0, 0, PoolStats(owned_bytes=7, served_rows=3)
    )


class Group:
    """Says what it is told to say, and notes what it is asked for."""

    def __init__(self) -> None:
        self.to_say: deque[Event] = deque()
        self.started: list[int] = []
        self.sent: list[tuple[int, Message]] = []

    async def start(self, replica: int) -> None:
        self.started.append(replica)

    def send(self, replica: int, message: Message) -> None:
        self.sent.append((replica, message))

    async def next_event(self, timeout_seconds: float) -> Event | None:
        return self.to_say.popleft() if self.to_say else None


class Played:
    """A fleet, its replicas and the group behind them."""

    def __init__(
        self, num_replicas: int = 1, max_restarts: int = 1, mode: PoolMode = "mapped"
    ) -> None:
        plan = make_plan(num_replicas, mode)
        self.group: Any = Group()
        self.replicas = new_replicas(plan, max_restarts)
        self.fleet = Fleet(plan, self.replicas, self.group)

    def hears(self, replica: int, message: Any) -> FleetEvent | None:
        self.group.to_say.append(Event(replica, message))
        return asyncio.run(self.fleet.next_event(0))

    def dies(self, replica: int, among_suspects: bool = False, num_killers: int = 0) -> Any:
        lost = self.hears(replica, KILLED)
        assert lost == Lost(replica, KILLED.reason)
        assert isinstance(lost, Lost)
        return self.fleet.bury(lost, among_suspects, num_killers)


def test_what_concerns_rows_is_passed_on() -> None:
    played = Played(2)
    assert played.fleet.is_starting
    assert played.hears(1, READY) == Joined(1, 1000)
    assert played.fleet.is_starting, "the other is not ready"
    assert played.hears(0, READY) == Joined(0, 1000)
    assert not played.fleet.is_starting
    for answer in (RowAnswer(4, 200, {}), RowFailure(5, "row_timeout", "no")):
        assert played.hears(1, answer) == Answered(1, answer)
    assert played.hears(0, _stats(10)) is None
    assert asyncio.run(played.fleet.next_event(0)) is None
    assert [stats.prompt_tokens for stats in played.fleet.stats] == [10, 0]


def test_counters_go_on_over_lives() -> None:
    played = Played(max_restarts=5)
    played.hears(0, READY)
    played.hears(0, _stats(10))
    played.dies(0)
    (stats,) = played.fleet.stats
    assert (stats.state, stats.num_running, stats.prompt_tokens) == ("restarting", 0, 10)
    played.hears(0, READY)
    played.hears(0, _stats(5))
    (stats,) = played.fleet.stats
    assert (stats.state, stats.num_running, stats.prompt_tokens) == ("running", 1, 15)
    assert (stats.pool.owned_bytes, stats.pool.served_rows) == (7, 6)


def test_a_replica_starts_again_after_its_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elbowroom.jobs.restarts._FIRST_DELAY_SECONDS", 0.0)
    played = Played(2, max_restarts=5)
    asyncio.run(played.fleet.start())
    fate = played.dies(1)
    assert not fate.ends_job
    assert "is started again in 0 s" in fate.text
    for _ in range(2):
        asyncio.run(played.fleet.restart_due())
    assert played.group.started == [0, 1, 1]
    assert played.replicas[1].report().num_restarts == 1
    assert played.fleet.stats[1].state == "starting"


def test_a_replica_that_ends_by_itself_before_it_was_ready_fails() -> None:
    played = Played()
    with pytest.raises(ReplicaError, match="replica 0 exited with 3"):
        played.hears(0, Died("exited with 3", was_killed=False))
    played.hears(0, READY)
    assert played.hears(0, Died("exited with 3", was_killed=False)) == Lost(0, "exited with 3")


def test_a_replica_is_given_up_and_then_the_last_one() -> None:
    played = Played(2, max_restarts=0)
    for replica in range(2):
        played.hears(replica, READY)
    first, last = played.dies(0), played.dies(1)
    assert not first.ends_job
    assert "given up; the others continue" in first.text
    assert last.ends_job
    assert [stats.state for stats in played.fleet.stats] == ["lost", "lost"]


@pytest.mark.parametrize(("mode", "ends_job"), [("mapped", True), ("none", False)])
def test_a_pool_needs_every_owner(mode: PoolMode, ends_job: bool) -> None:
    """The layers of a replica that never loaded them are nowhere."""
    assert Played(2, max_restarts=0, mode=mode).dies(0).ends_job == ends_job


def test_deaths_by_rows_do_not_count() -> None:
    played = Played(max_restarts=2)
    played.hears(0, READY)
    for _ in range(5):
        assert not played.dies(0).ends_job
        assert not played.dies(0, among_suspects=True, num_killers=1).ends_job
        played.hears(0, RowAnswer(0, 200, {}))


def test_replicas_end_with_their_last_counters() -> None:
    played = Played(3)
    for replica in range(3):
        played.hears(replica, READY)
    played.dies(2)
    played.group.to_say += [Event(0, _stats(1)), Event(1, KILLED), Event(0, Stopped(_stats(9)))]
    asyncio.run(played.fleet.stop())
    assert sorted(played.group.sent) == [(0, Stop()), (1, Stop())], "the third is not running"
    assert [stats.state for stats in played.fleet.stats] == ["stopped", "running", "restarting"]
    assert played.fleet.stats[0].prompt_tokens == 9


_SPEAKS_NONSENSE = """
import socket, struct, sys, time
sock = socket.socket(fileno=int(sys.argv[1]))
sock.sendall(struct.pack("<I", 16) + b'{"type":"Reset"}')
time.sleep(60)
"""


def test_a_replica_that_speaks_nonsense_is_ended(tmp_path: Path) -> None:
    async def listen() -> Event | None:
        command = [sys.executable, "-c", _SPEAKS_NONSENSE]
        async with ReplicaGroup(make_plan(1), tmp_path, tmp_path, command) as group:
            await group.start(0)
            return await group.next_event(20)

    event = asyncio.run(listen())
    reason = "failed: it sent no message of this version: 'Reset'"
    log = f"\n  its log: {tmp_path / 'replica-0.log'}"
    assert event == Event(0, Died(reason + log, was_killed=False))


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("one\ntwo\n", ["one", "two"]),
        (
            "(EngineCore pid=7) ERROR 11-26 10:00:00 [core.py:9] EngineCore failed to start.\n"
            "(EngineCore pid=7) ERROR 11-26 10:00:00 [core.py:9] Traceback (most recent)\n"
            "(EngineCore pid=7) ERROR 11-26 10:00:00 [core.py:9] torch.OutOfMemoryError: no room\n"
            "Traceback (most recent call last):\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            ["torch.OutOfMemoryError: no room"],
        ),
    ],
)
def test_a_failed_start_shows_its_own_error(log: str, shown: list[str], tmp_path: Path) -> None:
    """Not what is raised because of it, which says to look above."""
    command = (sys.executable, "-c", f"import sys; sys.stderr.write({log!r}); sys.exit(3)")

    async def listen() -> Event | None:
        async with ReplicaGroup(make_plan(1), tmp_path, tmp_path, command) as group:
            await group.start(0)
            return await group.next_event(20)

    event = asyncio.run(listen())
    assert event is not None
    assert isinstance(event.message, Died)
    lines = [f"  | {line}" for line in shown]
    named = f"  its log: {tmp_path / 'replica-0.log'}"
    assert event.message.reason.splitlines() == ["exited with 3", *lines, named]
