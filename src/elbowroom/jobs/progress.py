"""The live view: a table on a terminal, or a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elbowroom.core.errors import optional
from elbowroom.core.units import format_bytes
from elbowroom.pool.stats import PoolStats

WINDOW_SECONDS = 10.0
DRAW_SECONDS = 0.25
PLAIN_SECONDS = 5.0

_COLUMNS = ("replica", "state", "running", "waiting", "KV use", "output tokens", "pool")
_NARROW = ("replica", "state", "running", "KV use")
_FULL_WIDTH = 75
"""Columns of a terminal that has room for the whole table."""


@dataclass(frozen=True)
class ReplicaStats:
    """State and counters that a replica last reported. ``kv_usage`` is between 0 and 1."""

    replica: int
    state: str
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    pool: PoolStats = field(default_factory=PoolStats)


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment. ``run_seconds`` counts from when the replicas were ready.

    ``rows_resumed`` of the rows done were done by earlier runs.
    """

    rows_total: int
    rows_done: int
    rows_failed: int
    elapsed_seconds: float
    run_seconds: float
    replicas: tuple[ReplicaStats, ...]
    rows_resumed: int = 0


class _Tokens(NamedTuple):
    """Tokens summed over all replicas, or such tokens per second."""

    prompt: float
    output: float


class _Sample(NamedTuple):
    seconds: float
    tokens: _Tokens


class ProgressView:
    """View that shows snapshots as they come. It has no thread: calls of ``update`` set the pace.

    A screen that fails is not tried again: the job does not depend on it. ``update`` may be called
    for every message: within DRAW_SECONDS of the last drawing (PLAIN_SECONDS without a terminal),
    nothing is drawn.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._samples: deque[_Sample] = deque()
        self._shown_at = float("-inf")
        self._unshown: JobSnapshot | None = None
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._is_blind = False

    def __enter__(self) -> ProgressView:
        with optional("progress", self._give_up):
            if self._console.is_terminal:
                self._live.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        with optional("progress", self._give_up):
            self._live.stop()
            if self._unshown and exc_type is None and not self._console.is_terminal:
                self._show(self._unshown)  # a short job ends between two lines

    def update(self, snapshot: JobSnapshot) -> None:
        """Take a snapshot, and show it if the last one shown is old enough."""
        if not self._is_blind:
            with optional("progress", self._give_up):
                self._update(snapshot)

    def _give_up(self, text: str) -> None:
        self._is_blind = True
        self._console.print(text, markup=False)

    def _update(self, snapshot: JobSnapshot) -> None:
        now = self._clock()
        self._unshown = snapshot
        pause_seconds = DRAW_SECONDS if self._console.is_terminal else PLAIN_SECONDS
        if not self._samples or now - self._samples[-1].seconds >= DRAW_SECONDS:
            self._sample(now, snapshot)
        if now - self._shown_at >= pause_seconds:
            self._shown_at = now
            self._show(snapshot)

    def _line(self, snapshot: JobSnapshot) -> str:
        replicas = " ".join(f"[{_describe(replica)}]" for replica in snapshot.replicas)
        return f"{self._headline(snapshot)} {replicas}"

    def _sample(self, now: float, snapshot: JobSnapshot) -> None:
        """Keep a sample, and of those before the window only the newest."""
        self._samples.append(_Sample(now, _tokens(snapshot)))
        while len(self._samples) > 1 and now - self._samples[1].seconds >= WINDOW_SECONDS:
            self._samples.popleft()

    def _show(self, snapshot: JobSnapshot) -> None:
        self._unshown = None
        if self._console.is_terminal:
            self._live.update(self._screen(snapshot), refresh=True)
        else:
            self._console.print(
                self._line(snapshot), soft_wrap=True, highlight=False, markup=False, emoji=False
            )

    def _headline(self, snapshot: JobSnapshot) -> str:
        """Text with rows, tokens per second lately and overall, and the time left."""
        first, last = self._samples[0], self._samples[-1]
        lately = _per_second(first.tokens, last.tokens, last.seconds - first.seconds)
        overall = _per_second(_Tokens(0, 0), _tokens(snapshot), snapshot.run_seconds)
        failed = f" ({snapshot.rows_failed} failed)" if snapshot.rows_failed else ""
        return (
            f"{snapshot.rows_done}/{snapshot.rows_total} rows{failed}, "
            f"tokens/s: {lately.prompt:.0f} prompt ({overall.prompt:.0f} overall), "
            f"{lately.output:.0f} output ({overall.output:.0f} overall), "
            f"{clock_text(snapshot.elapsed_seconds)} elapsed, ETA {_eta(snapshot)}"
        )

    def _screen(self, snapshot: JobSnapshot) -> Group:
        columns = _COLUMNS if self._console.width >= _FULL_WIDTH else _NARROW
        table = Table(box=None)
        for name in columns:
            table.add_column(name, justify="right")
        for replica in snapshot.replicas:
            values = {
                "replica": str(replica.replica),
                "state": replica.state,
                "running": str(replica.num_running),
                "waiting": str(replica.num_waiting),
                "KV use": f"{replica.kv_usage:.0%}",
                "output tokens": str(replica.generation_tokens),
                "pool": _describe_pool(replica.pool),
            }
            table.add_row(*(values[name] for name in columns))
        return Group(Text(self._headline(snapshot)), table)


def _tokens(snapshot: JobSnapshot) -> _Tokens:
    """Tokens of all replicas since they started."""
    return _Tokens(
        sum(replica.prompt_tokens for replica in snapshot.replicas),
        sum(replica.generation_tokens for replica in snapshot.replicas),
    )


def _per_second(before: _Tokens, after: _Tokens, seconds: float) -> _Tokens:
    """Tokens per second between two samples; 0 if no time has passed."""
    if seconds <= 0:
        return _Tokens(0, 0)
    return _Tokens(
        (after.prompt - before.prompt) / seconds, (after.output - before.output) / seconds
    )


def _describe(replica: ReplicaStats) -> str:
    if replica.state != "running":
        return f"{replica.replica} {replica.state}"
    pool = _describe_pool(replica.pool)
    return (
        f"{replica.replica}: {replica.num_running} running, {replica.num_waiting} waiting, "
        f"KV {replica.kv_usage:.0%}" + (f", {pool}" if pool else "")
    )


def _describe_pool(stats: PoolStats) -> str:
    """Text with what the pool moved so far, and how long compute waited for it."""
    parts = []
    if stats.streamed_iterations:
        parts.append(f"{stats.streamed_iterations} iterations streamed")
    if stats.shipped_iterations:
        parts.append(f"{stats.shipped_iterations} shipped with {stats.shipped_rows} rows")
    if stats.streamed_bytes:
        parts.append(f"{format_bytes(stats.streamed_bytes)} streamed")
    if parts:
        parts.append(f"waited {stats.wait_seconds:.1f} s")
    return ", ".join(parts)


def _eta(snapshot: JobSnapshot) -> str:
    """Time left at the pace so far; "-" until rows have finished."""
    done = snapshot.rows_done - snapshot.rows_resumed
    if done <= 0 or snapshot.run_seconds <= 0:
        return "-"
    left = snapshot.rows_total - snapshot.rows_done
    return clock_text(left * snapshot.run_seconds / done)


def clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
