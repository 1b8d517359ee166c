"""One batch job from file to file: journal, replicas, rows, published results, report."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from rich.console import Console

from elbowroom.core.errors import JobStoppedError, OutputError, ReplicaError, optional
from elbowroom.core.units import MIB, format_bytes
from elbowroom.engine.launch import REPLICA_COMMAND
from elbowroom.engine.wire import Message
from elbowroom.jobs.batch_file import BatchFile, RejectedRow, Row
from elbowroom.jobs.dispatcher import Dispatcher, TokenUsage, token_usage
from elbowroom.jobs.group import ReplicaGroup
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.journal import Journal, OnCommit
from elbowroom.jobs.journal_reader import FinishedRow, journal_folder
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.order import OrderBuilder
from elbowroom.jobs.progress import JobSnapshot, ProgressView, ReplicaStats
from elbowroom.jobs.prompts import BYTES_PER_TOKEN
from elbowroom.jobs.report import JobReport, ReplicaReport
from elbowroom.jobs.restarts import RestartPolicy
from elbowroom.jobs.results import error_line, publish, request_id, response_line
from elbowroom.plans.pool import Prediction, RunPlan
from elbowroom.pool.run_dir import run_directory
from elbowroom.pool.stats import PoolStats

TICK_SECONDS = 0.25
"""Longest time between two looks at the progress view, the journal and requests to stop."""

MEMORY_TOLERANCE = 0.05
_MEMORY_SLACK_BYTES = 64 * MIB  # the interpreter's own growth, which matters to tiny models only

Order = Literal["auto", "input"]

PredictActual = Callable[[int, int], Prediction | None]
"""From prompt and output tokens of a whole job."""


@dataclass(frozen=True)
class JobFiles:
    """Where a job reads and writes. Logs of replicas go to the journal's folder unless named."""

    input: BatchInput | Path
    output: Path
    errors: Path
    report: Path
    logs: Path | None = None


@dataclass(frozen=True)
class JobOptions:
    """How a job goes about its rows. ``restart`` drops what earlier runs have finished.

    ``bytes_per_token`` is what prompts are believed to have before any has finished: with a good
    guess, replicas are as full as they can be from the start.
    """

    limits: RowLimits = field(default_factory=RowLimits)
    order: Order = "auto"
    max_restarts: int = 3
    grace_seconds: float = 5.0
    restart: bool = False
    bytes_per_token: float = BYTES_PER_TOKEN


class StopRequest:
    """Asks a job, from its own thread, to stop after the rows in flight.

    ``is_heard`` while replicas run. Before and after, a job reads, plans and writes on the thread
    that calls it and asks nobody: who wants it to stop then interrupts that thread.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_heard = False

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason

    @contextmanager
    def heard(self) -> Iterator[None]:
        self.is_heard = True
        try:
            yield
        finally:
            self.is_heard = False


async def run_job(
    plan: RunPlan,
    files: JobFiles,
    options: JobOptions,
    identity: Mapping[str, str],
    console: Console,
    stop: StopRequest | None = None,
    on_rows: OnCommit | None = None,
    predict_actual: PredictActual | None = None,
    command: Sequence[str] = REPLICA_COMMAND,
) -> JobReport:
    """Answer every row of ``files.input`` that no earlier run has answered, and publish all.

    ``identity`` is what answers depend on: a journal with another one is refused. At the end
    ``predict_actual`` predicts again, from the numbers of prompt and output tokens that occurred.

    Raises InputError for files that cannot be used, ReplicaError when a replica fails at its first
    start, OutputError when another run has the journal or it cannot be opened, JobStoppedError when
    the job ended early, also for want of disk. Rows that were finished stay finished.
    """
    stop = stop or StopRequest()
    with ExitStack() as stack:
        batch = stack.enter_context(BatchFile(files.input, options.limits))
        order = _scan(batch, options.order)
        journal = stack.enter_context(Journal(files.output, options.restart, on_rows))
        is_finished = journal.admit(identity, batch)
        rows = batch.rows(int(index) for index in order if not is_finished[index])
        job = _Job(plan, options, batch, journal, console, stop)
        try:
            if (first := job.refuse_until_row(rows)) is not None:
                log_dir = files.logs or journal_folder(files.output) / "logs"
                log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                place = run_directory(num_bytes=plan.shared_bytes, say=job.say)
                with place as run_dir, stop.heard():
                    async with ReplicaGroup(plan, run_dir, log_dir, command) as group:
                        await job.answer(chain([first], rows), group)
            journal.commit()
            if stop.reason is not None:
                raise JobStoppedError(f"{stop.reason}. {job.how_far()}")
            publish(journal, batch, files.output, files.errors)
        except OutputError as error:
            raise JobStoppedError(f"{error}. Then run the same command to go on") from error
        report = job.report()
        if predict_actual is not None:
            with optional("prediction for the tokens that came", job.say):
                told = predict_actual(report.prompt_tokens, report.output_tokens)
                report = replace(report, prediction_for_actual=told)
        if first is not None or not files.report.exists():
            with optional("report file", job.say):
                report.write(files.report)
        return report


def _scan(batch: BatchFile, order: Order) -> Iterable[int]:
    """Find the rows, and the order in which to work on them."""
    if order == "input":
        return range(batch.scan().num_rows)
    builder = OrderBuilder()
    batch.scan(builder.visit)
    return builder.order()


@dataclass
class _Replica:
    """What the runner last heard from one replica, and whether it will be started again.

    ``before`` holds the counters of its earlier lives; ``stats`` includes them.
    """

    rank: int
    policy: RestartPolicy
    stats: ReplicaStats
    before: ReplicaStats
    was_ready: bool = False
    restart_at: float | None = None
    num_restarts: int = 0
    num_kv_tokens: int = 0
    resident_bytes: int = 0
    start_seconds: float = 0.0

    @property
    def is_lost(self) -> bool:
        return self.stats.state == "lost"


class _Job:
    """The state of one run between its first replica and its last row."""

    def __init__(
        self,
        plan: RunPlan,
        options: JobOptions,
        batch: BatchFile,
        journal: Journal,
        console: Console,
        stop: StopRequest,
    ) -> None:
        self._plan = plan
        self._options = options
        self._batch = batch
        self._journal = journal
        self._console = console
        self._stop = stop
        self._replicas = [
            _Replica(rank, RestartPolicy(options.max_restarts), stats, stats)
            for rank in range(plan.num_replicas)
            for stats in [ReplicaStats(rank, "starting")]
        ]
        self._before = journal.totals
        self._begin = time.monotonic()
        self._ready_at: float | None = None
        self._done_at: float | None = None
        self._group: ReplicaGroup
        self._dispatcher: Dispatcher
        self._view: ProgressView

    def refuse_until_row(self, rows: Iterator[Row | RejectedRow]) -> Row | None:
        """Write down rows that no engine should see, up to the first that one should."""
        for row in rows:
            if isinstance(row, Row):
                return row
            self._refuse(row)
        return None

    async def answer(self, rows: Iterator[Row | RejectedRow], group: ReplicaGroup) -> None:
        """Start the replicas and keep each as full as it can be until the last row is answered."""
        self._group = group
        self._dispatcher = Dispatcher(rows, self._options.bytes_per_token)
        self._note()
        for replica in self._replicas:
            await group.start(replica.rank)
        with ProgressView(self._console) as self._view:
            while any(not replica.was_ready and not replica.is_lost for replica in self._replicas):
                await self._tick()
            self._ready_at = time.monotonic()
            self._check_memory()
            self._note()
            while not self._dispatcher.is_done:
                await self._offer()
                if self._dispatcher.is_done:
                    break
                await self._tick()
            self._done_at = time.monotonic()
            self._journal.commit()
            self._view.update(self._snapshot())
        await self._stop_replicas()

    def report(self) -> JobReport:
        totals = self._journal.totals
        ready_at = self._ready_at or self._begin
        return JobReport(
            plan=self._plan,
            num_rows=self._batch.num_rows,
            num_succeeded=totals.num_succeeded,
            num_resumed=self._before.num_finished,
            failures=totals.failures,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.output_tokens,
            run_output_tokens=totals.output_tokens - self._before.output_tokens,
            start_seconds=ready_at - self._begin,
            run_seconds=(self._done_at or ready_at) - ready_at,
            replicas=tuple(
                ReplicaReport(
                    rank=replica.rank,
                    num_kv_tokens=replica.num_kv_tokens,
                    resident_bytes=replica.resident_bytes,
                    start_seconds=replica.start_seconds,
                    num_restarts=replica.num_restarts,
                    num_preemptions=replica.stats.num_preemptions,
                    prefix_query_tokens=replica.stats.prefix_query_tokens,
                    prefix_hit_tokens=replica.stats.prefix_hit_tokens,
                    pool=replica.stats.pool,
                )
                for replica in self._replicas
            ),
        )

    async def _offer(self) -> None:
        for offer in self._dispatcher.offers():
            if isinstance(offer, RejectedRow):
                self._refuse(offer)
                await asyncio.sleep(0)  # a long run of them must not hold up signals
                continue
            row = offer.row
            message = {"id": row.index, "url": row.url, "body": row.body}
            limits = self._options.limits
            self._group.send(
                offer.rank,
                {
                    "type": "row",
                    **message,
                    "request_id": request_id(row.custom_id),
                    "max_seconds": limits.max_row_seconds,
                    "max_prompt_tokens": limits.max_prompt_tokens,
                },
            )
            await self._group.drain()

    async def _tick(self) -> None:
        """Hear one message, or let a moment pass; then whatever is due."""
        event = await self._group.next_event(TICK_SECONDS)
        if event is not None:
            await self._hear(self._replicas[event.rank], event.message)
        await self._restart_due()
        self._journal.tick()
        self._view.update(self._snapshot())
        if self._stop.reason is not None:
            await self._stop_early(self._stop.reason)

    async def _hear(self, replica: _Replica, message: Message) -> None:
        kind = message["type"]
        if kind == "ready":
            self._is_ready(replica, message)
        elif kind == "done":
            self._finish(replica, message)
        elif kind == "died":
            self._died(replica, message["reason"])
        elif kind in ("stats", "stopped"):
            before = replica.before
            replica.stats = ReplicaStats(
                replica=replica.rank,
                state="running" if kind == "stats" else "stopped",
                num_running=message["num_requests_running"],
                num_waiting=message["num_requests_waiting"],
                kv_usage=message["kv_cache_usage"],
                prompt_tokens=before.prompt_tokens + message["prompt_tokens"],
                generation_tokens=before.generation_tokens + message["generation_tokens"],
                num_preemptions=before.num_preemptions + message["num_preemptions"],
                prefix_query_tokens=before.prefix_query_tokens + message["prefix_query_tokens"],
                prefix_hit_tokens=before.prefix_hit_tokens + message["prefix_hit_tokens"],
                pool=PoolStats(**message["pool"]).after(before.pool),
            )

    def _is_ready(self, replica: _Replica, message: Message) -> None:
        replica.was_ready = True
        replica.num_kv_tokens = message["num_kv_tokens"]
        replica.resident_bytes = message["resident_bytes"]
        replica.start_seconds = message["start_seconds"]
        replica.stats = replace(replica.stats, state="running")
        max_rows = self._plan.engine.max_num_seqs
        self._dispatcher.join(replica.rank, replica.num_kv_tokens, max_rows)

    def _died(self, replica: _Replica, reason: str) -> None:
        """Have its rows tried again, and the replica started again if that may help.

        Raises ReplicaError when it never worked, JobStoppedError when no replica can go on.
        """
        what = f"replica {replica.rank} {reason}"
        if not replica.was_ready and not reason.startswith("was killed"):
            raise ReplicaError(what)  # it would fail the same way again
        among_suspects = self._dispatcher.holds_suspects(replica.rank)
        for row in self._dispatcher.lose(replica.rank):
            message = (
                f"{row.place}: the engine crashed twice with this row, the second time "
                f"with no other row in it"
            )
            self._fail(row, "engine_crashed", message)
            replica.policy.excuse()
        delay = replica.policy.died(among_suspects)
        state = "lost" if delay is None else "restarting"
        replica.before = replica.stats
        replica.stats = replace(
            replica.stats, state=state, num_running=0, num_waiting=0, kv_usage=0.0
        )
        if delay is not None:
            replica.restart_at = time.monotonic() + delay
            self.say(f"{what}\nit is started again in {delay:.0f} s")
            return
        gone = f"{what}\nit died more than {self._options.max_restarts} times and is given up"
        if not replica.was_ready and self._plan.shares[replica.rank].mode != "none":
            raise JobStoppedError(f"{gone}: its layers are missing in the pool. {self.how_far()}")
        if all(other.is_lost for other in self._replicas):
            raise JobStoppedError(f"{gone}, as all others were. {self.how_far()}")
        self.say(f"{gone}; the others go on")

    async def _restart_due(self) -> None:
        for replica in self._replicas:
            if replica.restart_at is not None and time.monotonic() >= replica.restart_at:
                replica.restart_at = None
                replica.num_restarts += 1
                replica.stats = replace(replica.stats, state="starting")
                await self._group.start(replica.rank)

    async def _stop_early(self, reason: str) -> None:
        """Let rows in flight finish for a while, then end the job."""
        in_flight = self._dispatcher.num_in_flight
        if in_flight:
            self.say(
                f"{reason}: {in_flight} rows in flight have {self._options.grace_seconds:g} s; "
                f"once more to stop at once"
            )
        deadline = time.monotonic() + self._options.grace_seconds
        while self._dispatcher.num_in_flight and time.monotonic() < deadline:
            event = await self._group.next_event(TICK_SECONDS)
            if event is not None:
                await self._hear(self._replicas[event.rank], event.message)
            self._view.update(self._snapshot())
        self._journal.commit()
        raise JobStoppedError(f"{reason}. {self.how_far()}")

    async def _stop_replicas(self) -> None:
        """Let every replica end by itself and send its last counters."""
        waiting = {r.rank for r in self._replicas if r.stats.state == "running"}
        for rank in waiting:
            self._group.send(rank, {"type": "stop"})
        while waiting:
            event = await self._group.next_event(TICK_SECONDS)
            if event is None:
                continue
            if event.message["type"] in ("stopped", "died"):
                waiting.discard(event.rank)
            if event.message["type"] != "died":  # all rows are answered: nothing is lost by it
                await self._hear(self._replicas[event.rank], event.message)

    def _refuse(self, row: RejectedRow) -> None:
        line = error_line(row.custom_id, code=row.code, message=row.message)
        self._journal.put(FinishedRow(row.index, row.custom_id, None, row.code, line))

    def _fail(self, row: Row, code: str, message: str) -> None:
        line = error_line(row.custom_id, code=code, message=message)
        self._journal.put(FinishedRow(row.index, row.custom_id, row.content_hash, code, line))

    def _finish(self, replica: _Replica, message: Message) -> None:
        """Write down an answer; a status other than 2xx is a failed row."""
        replica.policy.finished_row()
        error = message.get("error")
        usage = None if error else token_usage(message["body"])
        row = self._dispatcher.finish(replica.rank, message["id"], usage)
        if error:
            self._fail(row, error["code"], f"{row.place}: {error['message']}")
            return
        status = message["status"]
        failure = None if 200 <= status < 300 else f"http_{status}"
        line = response_line(row.custom_id, status, message["body"])
        tokens = usage or TokenUsage(0, 0)
        self._journal.put(
            FinishedRow(row.index, row.custom_id, row.content_hash, failure, line, *tokens)
        )

    def how_far(self) -> str:
        self._journal.commit()
        return (
            f"{self._journal.totals.num_finished} of {self._batch.num_rows} rows are finished and "
            f"kept: run the same command again to go on"
        )

    def say(self, text: str) -> None:
        with suppress(Exception):  # the terminal may be gone, and the job is not
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _note(self) -> None:
        """For ``elbowroom status``."""
        self._journal.note(
            pid=os.getpid(),
            num_replicas=self._plan.num_replicas,
            num_resumed=self._before.num_finished,
            resumed_output_tokens=self._before.output_tokens,
            started_at=time.time() - (time.monotonic() - self._begin),
            ready_at=None if self._ready_at is None else time.time(),
        )

    def _snapshot(self) -> JobSnapshot:
        totals = self._journal.totals
        now = time.monotonic()
        return JobSnapshot(
            rows_total=self._batch.num_rows,
            rows_done=totals.num_finished,
            rows_failed=totals.num_failed,
            elapsed_seconds=now - self._begin,
            run_seconds=now - self._ready_at if self._ready_at else 0.0,
            replicas=tuple(replica.stats for replica in self._replicas),
            rows_resumed=self._before.num_finished,
        )

    def _check_memory(self) -> None:
        """Warn when a replica holds more or less than its memory budget says."""
        budget = self._plan.budget
        expected = budget.weight_bytes + budget.slot_bytes
        for replica in self._replicas:
            difference = replica.resident_bytes - expected
            if replica.resident_bytes and abs(difference) > max(
                MEMORY_TOLERANCE * expected, _MEMORY_SLACK_BYTES
            ):
                self.say(
                    f"warning: replica {replica.rank} holds {format_bytes(replica.resident_bytes)} "
                    f"of weights and slots, the memory budget says {format_bytes(expected)}"
                )
