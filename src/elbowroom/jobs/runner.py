"""One batch job from file to file: start replicas, dispatch rows, publish results, report."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from elbowroom.core.plan import RunPlan
from elbowroom.core.units import MIB, format_bytes
from elbowroom.engine.launch import REPLICA_COMMAND
from elbowroom.engine.wire import Message
from elbowroom.jobs.batch_file import BatchFacts, RejectedRow, read_rows
from elbowroom.jobs.dispatcher import Dispatcher, Intake, TokenUsage, token_usage
from elbowroom.jobs.group import ReplicaGroup
from elbowroom.jobs.progress import JobSnapshot, ProgressView, ReplicaStats
from elbowroom.jobs.report import JobReport, ReplicaReport
from elbowroom.jobs.spool import Spool, error_line, response_line
from elbowroom.pool.run_dir import run_directory

TICK_SECONDS = 0.25
"""Time between two looks at the progress view."""

MEMORY_TOLERANCE = 0.05
_MEMORY_SLACK_BYTES = 64 * MIB  # the interpreter's own growth, which matters to tiny models only


@dataclass(frozen=True)
class JobFiles:
    """Where a job reads and writes. Logs of replicas go to the run directory if not asked for."""

    input: Path
    output: Path
    errors: Path
    report: Path
    logs: Path | None = None


@dataclass
class ReplicaState:
    """What the runner last heard from one replica."""

    stats: ReplicaStats
    num_kv_tokens: int = 0
    resident_bytes: int = 0
    start_seconds: float = 0.0
    wait_seconds: float = 0.0


async def run_job(
    plan: RunPlan,
    files: JobFiles,
    facts: BatchFacts,
    console: Console,
    command: Sequence[str] = REPLICA_COMMAND,
) -> JobReport:
    """Answer every row of ``files.input`` and publish the results.

    Raises ReplicaError when a replica fails or dies: then nothing is published. OutputError when
    results cannot be written.
    """
    with run_directory() as run_dir, Spool(files.output.parent, facts.num_rows) as spool:
        log_dir = files.logs or run_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        async with ReplicaGroup(plan, run_dir, log_dir, command) as group:
            job = _Job(plan, facts, group, spool, console)
            await job.start()
            await job.answer_all(files.input)
            await job.stop()
        spool.publish(files.output, files.errors)
    report = job.report()
    report.write(files.report)
    return report


class _Job:
    """The state of one run between its first replica and its last row."""

    def __init__(
        self,
        plan: RunPlan,
        facts: BatchFacts,
        group: ReplicaGroup,
        spool: Spool,
        console: Console,
    ) -> None:
        self._plan = plan
        self._facts = facts
        self._group = group
        self._spool = spool
        self._console = console
        self._replicas = [
            ReplicaState(ReplicaStats(rank, "starting")) for rank in range(plan.num_replicas)
        ]
        self._failures: Counter[str] = Counter()
        self._usage = TokenUsage(0, 0)
        self._is_ready = False
        self._begin = time.monotonic()
        self._ready_at = self._begin
        self._done_at = self._begin

    async def start(self) -> None:
        """Wait until every replica is ready, then compare its memory with the account."""
        with ProgressView(self._console) as view:
            while any(replica.stats.state == "starting" for replica in self._replicas):
                await self._tick(view)
        self._ready_at = time.monotonic()
        self._is_ready = True
        self._check_memory()

    async def answer_all(self, path: Path) -> None:
        """Keep every replica as full as it can be until the last row is answered."""
        rows = read_rows(path, self._facts)
        max_rows = self._plan.engine.max_num_seqs
        intakes = {
            rank: Intake(replica.num_kv_tokens, max_rows)
            for rank, replica in enumerate(self._replicas)
        }
        dispatcher = Dispatcher(rows, intakes)
        with ProgressView(self._console) as view:
            while not dispatcher.is_done:
                await self._offer(dispatcher)
                message = await self._tick(view) if dispatcher.num_in_flight else None
                if message is not None and message["type"] == "done":
                    self._finish(dispatcher, message)
            self._done_at = time.monotonic()
            view.update(self._snapshot())

    async def stop(self) -> None:
        """Let every replica end by itself and send its last counters."""
        for rank in range(self._plan.num_replicas):
            self._group.send(rank, {"type": "stop"})
        waiting = set(range(self._plan.num_replicas))
        while waiting:
            event = await self._group.next_event(TICK_SECONDS)
            if event is not None and event.message["type"] == "stopped":
                self._hear(event.rank, event.message)
                waiting.discard(event.rank)

    def report(self) -> JobReport:
        return JobReport(
            plan=self._plan,
            num_rows=self._facts.num_rows,
            num_succeeded=self._spool.num_succeeded,
            failures=dict(self._failures),
            prompt_tokens=self._usage.prompt_tokens,
            output_tokens=self._usage.output_tokens,
            start_seconds=self._ready_at - self._begin,
            run_seconds=self._done_at - self._ready_at,
            replicas=tuple(
                ReplicaReport(
                    rank=rank,
                    num_kv_tokens=replica.num_kv_tokens,
                    resident_bytes=replica.resident_bytes,
                    start_seconds=replica.start_seconds,
                    num_preemptions=replica.stats.num_preemptions,
                    mapped_bytes=replica.stats.mapped_bytes,
                    streamed_bytes=replica.stats.streamed_bytes,
                    wait_seconds=replica.wait_seconds,
                )
                for rank, replica in enumerate(self._replicas)
            ),
        )

    async def _offer(self, dispatcher: Dispatcher) -> None:
        for offer in dispatcher.offers():
            if isinstance(offer, RejectedRow):
                self._failures[offer.code] += 1
                line = error_line(offer.custom_id, code=offer.code, message=offer.message)
                self._spool.put(offer.index, line, is_success=False)
                await asyncio.sleep(0)  # a long run of them must not hold up signals
                continue
            row = offer.row
            message = {"type": "row", "id": row.index, "url": row.url, "body": row.body}
            self._group.send(offer.rank, message)
            await self._group.drain()

    async def _tick(self, view: ProgressView) -> Message | None:
        """Hear one message, or let a moment pass. Returns it with its ``rank``."""
        event = await self._group.next_event(TICK_SECONDS)
        view.update(self._snapshot())
        if event is None:
            return None
        self._hear(event.rank, event.message)
        return {**event.message, "rank": event.rank}

    def _hear(self, rank: int, message: Message) -> None:
        """Keep what a replica says of itself."""
        replica = self._replicas[rank]
        if message["type"] == "ready":
            replica.num_kv_tokens = message["num_kv_tokens"]
            replica.resident_bytes = message["resident_bytes"]
            replica.start_seconds = message["start_seconds"]
            replica.stats = replace(replica.stats, state="running")
        elif message["type"] in ("stats", "stopped"):
            replica.wait_seconds = message["pool"]["wait_seconds"]
            replica.stats = ReplicaStats(
                replica=rank,
                state="running" if message["type"] == "stats" else "stopped",
                num_running=message["num_requests_running"],
                num_waiting=message["num_requests_waiting"],
                kv_usage=message["kv_cache_usage"],
                prompt_tokens=message["prompt_tokens"],
                generation_tokens=message["generation_tokens"],
                num_preemptions=message["num_preemptions"],
                mapped_bytes=message["pool"]["mapped_bytes"],
                streamed_bytes=message["pool"]["streamed_bytes"],
            )

    def _finish(self, dispatcher: Dispatcher, message: Message) -> None:
        """Write down an answer; a status other than 2xx is a failed row."""
        usage = token_usage(message["body"])
        row = dispatcher.finish(message["rank"], message["id"], usage)
        if usage is not None:
            self._usage = TokenUsage(
                self._usage.prompt_tokens + usage.prompt_tokens,
                self._usage.output_tokens + usage.output_tokens,
            )
        is_success = 200 <= message["status"] < 300
        if not is_success:
            self._failures[f"http_{message['status']}"] += 1
        line = response_line(row.custom_id, message["status"], message["body"])
        self._spool.put(row.index, line, is_success)

    def _snapshot(self) -> JobSnapshot:
        return JobSnapshot(
            rows_total=self._facts.num_rows,
            rows_done=self._spool.num_succeeded + self._spool.num_failed,
            rows_failed=self._spool.num_failed,
            elapsed_seconds=time.monotonic() - self._begin,
            run_seconds=time.monotonic() - self._ready_at if self._is_ready else 0.0,
            replicas=tuple(replica.stats for replica in self._replicas),
        )

    def _check_memory(self) -> None:
        """Warn when a replica holds more or less than its account says."""
        account = self._plan.account
        expected = account.weight_bytes + account.slot_bytes
        for rank, replica in enumerate(self._replicas):
            difference = replica.resident_bytes - expected
            if replica.resident_bytes and abs(difference) > max(
                MEMORY_TOLERANCE * expected, _MEMORY_SLACK_BYTES
            ):
                self._console.print(
                    f"warning: replica {rank} holds {format_bytes(replica.resident_bytes)} of "
                    f"weights and slots, the account says {format_bytes(expected)}"
                )
