"""The live view: a table on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

WINDOW_SECONDS = 10.0
PLAIN_SECONDS = 5.0


@dataclass(frozen=True)
class ReplicaStats:
    """What a replica last said of itself. ``kv_usage`` is between 0 and 1."""

    replica: int
    state: str
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    mapped_bytes: int = 0
    streamed_bytes: int = 0


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment. ``run_seconds`` counts from when the replicas were ready."""

    rows_total: int
    rows_done: int
    rows_failed: int
    elapsed_seconds: float
    run_seconds: float
    replicas: tuple[ReplicaStats, ...]


class _Sample(NamedTuple):
    seconds: float
    prompt_tokens: int
    generation_tokens: int


class ProgressView:
    """Shows snapshots as they come. Has no thread: whoever calls ``update`` sets the pace."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._samples: deque[_Sample] = deque()
        self._printed_at = float("-inf")
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> ProgressView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, snapshot: JobSnapshot) -> None:
        now = self._clock()
        self._samples.append(
            _Sample(
                now,
                sum(replica.prompt_tokens for replica in snapshot.replicas),
                sum(replica.generation_tokens for replica in snapshot.replicas),
            )
        )
        while now - self._samples[0].seconds > WINDOW_SECONDS:
            self._samples.popleft()
        if self._console.is_terminal:
            self._live.update(self._table(snapshot), refresh=True)
        elif now - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = now
            self._console.print(self.line(snapshot), soft_wrap=True, highlight=False)

    def line(self, snapshot: JobSnapshot) -> str:
        """The job in one line: rows, tokens per second over the last seconds, replicas, ETA."""
        first, last = self._samples[0], self._samples[-1]
        seconds = max(last.seconds - first.seconds, 1e-9)
        prompt = (last.prompt_tokens - first.prompt_tokens) / seconds
        output = (last.generation_tokens - first.generation_tokens) / seconds
        if len(self._samples) == 1:
            prompt = output = 0.0
        failed = f" ({snapshot.rows_failed} failed)" if snapshot.rows_failed else ""
        replicas = " ".join(f"[{_describe(replica)}]" for replica in snapshot.replicas)
        return (
            f"{snapshot.rows_done}/{snapshot.rows_total} rows{failed}, "
            f"{prompt:.0f} prompt and {output:.0f} output tokens/s, "
            f"{_clock_text(snapshot.elapsed_seconds)} elapsed, ETA {_eta(snapshot)} "
            f"{replicas}"
        )

    def _table(self, snapshot: JobSnapshot) -> Table:
        head, _, _ = self.line(snapshot).partition(" [")
        table = Table(title=head, title_justify="left", box=None)
        for name in ("replica", "state", "running", "waiting", "KV use", "output tokens"):
            table.add_column(name, justify="right")
        for replica in snapshot.replicas:
            table.add_row(
                str(replica.replica),
                replica.state,
                str(replica.num_running),
                str(replica.num_waiting),
                f"{replica.kv_usage:.0%}",
                str(replica.generation_tokens),
            )
        return table


def _describe(replica: ReplicaStats) -> str:
    if replica.state != "running":
        return f"{replica.replica} {replica.state}"
    return (
        f"{replica.replica}: {replica.num_running} running, {replica.num_waiting} waiting, "
        f"KV {replica.kv_usage:.0%}"
    )


def _eta(snapshot: JobSnapshot) -> str:
    """Time left at the pace so far; unknown until rows have finished."""
    if not snapshot.rows_done or snapshot.run_seconds <= 0:
        return "-"
    left = snapshot.rows_total - snapshot.rows_done
    return _clock_text(left * snapshot.run_seconds / snapshot.rows_done)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
