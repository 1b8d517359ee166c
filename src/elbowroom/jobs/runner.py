"""Runs one batch job from file to file: rows are offered, replicas heard, results recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from elbowroom.core.errors import InputError, JobStoppedError, OutputError, optional
from elbowroom.core.files import read_json
from elbowroom.engine.launch import REPLICA_COMMAND
from elbowroom.engine.wire import RowAnswer, RowFailure, RowRequest
from elbowroom.jobs.dispatcher import Dispatcher, token_usage
from elbowroom.jobs.fleet import Answered, Fleet, FleetEvent, Joined, Lost, Replica, new_replicas
from elbowroom.jobs.group import ReplicaGroup
from elbowroom.jobs.job import Job, how_to_resume
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import written_files
from elbowroom.jobs.ledger import Ledger
from elbowroom.jobs.progress import ProgressView
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.results import publish, request_id
from elbowroom.jobs.rows import RejectedRow, Row
from elbowroom.pool.run_dir import run_directory

TICK_SECONDS = 0.25
"""Longest time between two looks at the progress view, the journal and requests to stop."""


async def run_job(job: Job, command: Sequence[str] = REPLICA_COMMAND) -> JobReport:
    """Answer every row of the job's input that no earlier run has answered, and publish all.

    ``command`` starts a replica.

    Raises InputError for files that cannot be used, ReplicaError when a replica fails at its first
    start, OutputError when another run has the journal or it cannot be opened, JobStoppedError when
    the job ended early, also for want of disk. Rows that were finished stay finished.
    """
    files, options, batch = job.files, job.options, job.input.batch
    with Journal(files.output, options.restart, job.on_rows) as journal:
        is_finished = journal.admit(
            job.identity, batch, _settings(job), retry_failed=options.retry_failed
        )
        _say_failed(job, journal)
        rows = batch.rows(int(index) for index in job.input.order if not is_finished[index])
        ledger = Ledger(journal, batch)
        replicas = new_replicas(job.plan, options.max_restarts)
        try:
            if (first := ledger.refuse_until_row(rows)) is not None:
                await _answer(job, chain([first], rows), ledger, replicas, command)
            ledger.commit()
            if job.stop.reason is not None:
                raise _stopped(job, ledger, job.stop.reason)
            own = files.written(has_failed=journal.totals.num_failed > 0)
            journal.note(files=sorted(own | written_files(files.output)))
            publish(journal, batch, files.output, files.errors)
        except OutputError as error:
            message = f"{error}. Then {how_to_resume(options.restart)}"
            raise JobStoppedError(message) from error
        report = ledger.report(job.plan, [replica.report() for replica in replicas])
        report = _look_back(job, report)
        if first is not None or not _is_told(report, files.report):
            with optional("report file", job.say):
                report.write(files.report)
        return report


def _stopped(job: Job, ledger: Ledger, reason: str) -> JobStoppedError:
    """The error of a job that stops: why, how far it is, and how to resume."""
    advice = how_to_resume(job.options.restart)
    return JobStoppedError(f"{reason}. {ledger.how_far()}: {advice}")


def _settings(job: Job) -> dict[str, object]:
    """What the failure of a row may lie in, besides the job's identity."""
    limits, engine = job.options.limits, job.plan.engine
    return {
        "served_model_names": engine.served_model_names,
        "max_model_len": engine.max_model_len,
        "max_prompt_tokens": limits.max_prompt_tokens,
        "max_row_seconds": limits.max_row_seconds,
    }


def _say_failed(job: Job, journal: Journal) -> None:
    """Say what becomes of rows that failed in earlier runs."""
    if journal.num_retried:
        job.say(f"{journal.num_retried} rows that failed are tried again")
    if journal.totals.num_failed:
        job.say(f"{journal.totals.num_failed} rows have failed: --retry-failed tries them again")


def _is_told(report: JobReport, path: Path) -> bool:
    """Whether the report of an earlier run, which has its seconds, tells the same of all rows."""
    try:
        told = read_json(path)
    except InputError:
        return False
    counts = ("num_rows", "num_succeeded", "failures")
    return all(told.get(name) == getattr(report, name) for name in counts)


def _look_back(job: Job, report: JobReport) -> JobReport:
    """Add a prediction for the tokens that occurred, if the job can predict."""
    if job.predict_actual is not None:
        with optional("prediction for the tokens that came", job.say):
            told = job.predict_actual(report.prompt_tokens, report.output_tokens)
            return replace(report, prediction_for_actual=told)
    return report


async def _answer(
    job: Job,
    rows: Iterator[Row | RejectedRow],
    ledger: Ledger,
    replicas: Sequence[Replica],
    command: Sequence[str],
) -> None:
    """Answer rows with replicas that live as long as this takes."""
    plan, options = job.plan, job.options
    log_dir = job.files.log_folder
    log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = run_directory(num_bytes=plan.shared_bytes, say=job.say)
    with place as run_dir, job.stop.heard():
        async with ReplicaGroup(plan, run_dir, log_dir, command) as group:
            fleet = Fleet(plan, replicas, group)
            dispatcher = Dispatcher(rows, options.bytes_per_token, job.plan.budget.kv_groups)
            await _Run(job, fleet, dispatcher, ledger, ProgressView(job.console)).answer()


class _Run:
    """Keeps each replica as full as it can be until the last row is answered."""

    def __init__(
        self, job: Job, fleet: Fleet, dispatcher: Dispatcher, ledger: Ledger, view: ProgressView
    ) -> None:
        self._job = job
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._view = view

    async def answer(self) -> None:
        """Start the replicas, answer all rows, and let the replicas end."""
        num_replicas = self._job.plan.num_replicas
        self._ledger.note(num_replicas)
        await self._fleet.start()
        with self._view:
            while self._fleet.is_starting:
                await self._hear()
            self._ledger.ready()
            for warning in self._fleet.memory_warnings():
                self._job.say(warning)
            self._ledger.note(num_replicas)
            await self._offer()
            while not self._dispatcher.is_done:
                await self._hear()
                await self._offer()
            self._ledger.done()
            self._show()
        await self._fleet.stop()

    async def _offer(self) -> None:
        """Hand out the rows that replicas have room for."""
        for offer in self._dispatcher.offers():
            if isinstance(offer, RejectedRow):
                self._ledger.refuse(offer)
                await asyncio.sleep(0)  # a long run of them must not hold up signals
            else:
                await self._fleet.send(offer.replica, self._request(offer.row))

    def _request(self, row: Row) -> RowRequest:
        return RowRequest(
            id=row.index,
            url=row.url,
            body=row.body,
            request_id=request_id(row.custom_id),
            max_seconds=self._job.options.limits.max_row_seconds,
            max_prompt_tokens=self._job.options.limits.max_prompt_tokens,
        )

    async def _hear(self) -> None:
        """Record one event, or let a moment pass; then whatever is due."""
        self._record(await self._fleet.next_event(TICK_SECONDS))
        await self._fleet.restart_due()
        self._ledger.tick()
        self._show()
        if self._job.stop.reason is not None:
            await self._stop_early(self._job.stop.reason)

    def _record(self, event: FleetEvent | None) -> None:
        match event:
            case Joined(replica, num_kv_tokens):
                plan = self._job.plan
                room = plan.budget.kept_by_every_layer(num_kv_tokens, plan.engine.max_model_len)
                self._dispatcher.join(replica, room, plan.engine.max_num_seqs)
            case Answered(replica, RowAnswer() as answer):
                usage = token_usage(answer.body)
                row = self._dispatcher.finish(replica, answer.id, usage)
                self._ledger.answer(row, answer, usage)
            case Answered(replica, RowFailure(index, code, message)):
                self._ledger.fail(self._dispatcher.finish(replica, index, None), code, message)
            case Lost():
                self._lose(event)

    def _lose(self, lost: Lost) -> None:
        """Have a dead replica's rows tried again, and start it again if that may help.

        Raises JobStoppedError when no replica can continue.
        """
        among_suspects = self._dispatcher.holds_suspects(lost.replica)
        killers = self._dispatcher.lose(lost.replica)
        for row in killers:
            self._ledger.fail(
                row,
                "engine_crashed",
                "the engine crashed twice with this row, the second time with no other row in it",
            )
        fate = self._fleet.bury(lost, among_suspects, len(killers))
        if fate.ends_job:
            raise _stopped(self._job, self._ledger, fate.text)
        self._job.say(fate.text)

    async def _stop_early(self, reason: str) -> None:
        """Let rows in flight finish for a while, then end the job."""
        grace_seconds = self._job.options.grace_seconds
        if in_flight := self._dispatcher.num_in_flight:
            self._job.say(
                f"{reason}: {in_flight} rows in flight have {grace_seconds:g} s; "
                f"once more to stop at once"
            )
        deadline = time.monotonic() + grace_seconds
        while self._dispatcher.num_in_flight and time.monotonic() < deadline:
            self._record(await self._fleet.next_event(TICK_SECONDS))
            self._show()
        self._ledger.commit()
        raise _stopped(self._job, self._ledger, reason)

    def _show(self) -> None:
        self._view.update(self._ledger.snapshot(self._fleet.stats))
