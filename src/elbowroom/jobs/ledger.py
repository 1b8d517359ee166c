"""Records of one run of a job: finished rows, notes for ``status``, the report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from elbowroom.engine.wire import RowAnswer
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.dispatcher import TokenUsage
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.progress import JobSnapshot, ReplicaStats
from elbowroom.jobs.report import JobReport, ReplicaReport
from elbowroom.jobs.results import error_line, response_line
from elbowroom.jobs.rows import RejectedRow, Row
from elbowroom.plans.pool import RunPlan


class Ledger:
    """Keeper of one run's journal, and of when the run began, was ready and was done.

    Totals are those of the whole job, earlier runs included. Rows are safe after ``commit``.
    """

    def __init__(self, journal: Journal, batch: BatchFile) -> None:
        """Begin a run now, on a journal that has admitted ``batch``."""
        self._journal = journal
        self._batch = batch
        self._before = journal.totals
        self._begin = time.monotonic()
        self._ready_at: float | None = None
        self._done_at: float | None = None

    def refuse(self, row: RejectedRow) -> None:
        """Write down a line that no engine should see."""
        line = error_line(row.custom_id, code=row.code, message=row.message)
        self._journal.put(FinishedRow(row.index, row.custom_id, None, row.code, line))

    def refuse_until_row(self, rows: Iterator[Row | RejectedRow]) -> Row | None:
        """Write down lines that no engine should see, up to the first row that one should."""
        for row in rows:
            if isinstance(row, Row):
                return row
            self.refuse(row)
        return None

    def fail(self, row: Row, code: str, message: str) -> None:
        """Write down a row that has no answer. Its place in the file is put before ``message``."""
        line = error_line(row.custom_id, code=code, message=f"{row.place}: {message}")
        self._put(row, code, line, TokenUsage(0, 0))

    def answer(self, row: Row, answer: RowAnswer, usage: TokenUsage | None) -> None:
        """Write down an answer; a status other than 2xx is a failed row."""
        failure = None if 200 <= answer.status < 300 else f"http_{answer.status}"
        line = response_line(row.custom_id, answer.status, answer.body)
        self._put(row, failure, line, usage or TokenUsage(0, 0))

    def _put(self, row: Row, failure: str | None, line: bytes, tokens: TokenUsage) -> None:
        own = (row.index, row.custom_id, row.content_hash)
        finished = FinishedRow(*own, failure, line, *tokens, meaning_hash=row.meaning_hash)
        self._journal.put(finished)

    def tick(self) -> None:
        """Make rows safe, if the oldest has waited long enough."""
        self._journal.tick()

    def commit(self) -> None:
        self._journal.commit()

    def ready(self) -> None:
        """Note that replicas answer rows from now on."""
        self._ready_at = time.monotonic()

    def done(self) -> None:
        """Note that the last row was answered now, and make all rows safe."""
        self._done_at = time.monotonic()
        self._journal.commit()

    def note(self, num_replicas: int) -> None:
        """Keep facts about this run for ``elbowroom status``."""
        self._journal.note(
            pid=os.getpid(),
            num_replicas=num_replicas,
            num_resumed=self._before.num_finished,
            resumed_output_tokens=self._before.output_tokens,
            started_at=time.time() - (time.monotonic() - self._begin),
            ready_at=None if self._ready_at is None else time.time(),
        )

    def how_far(self) -> str:
        """Text about how many rows are finished, for the message of a job that stops."""
        self._journal.commit()
        totals = self._journal.totals
        return f"{totals.num_finished} of {self._batch.num_rows} rows are finished and kept"

    def snapshot(self, replicas: tuple[ReplicaStats, ...]) -> JobSnapshot:
        totals = self._journal.totals
        now = time.monotonic()
        return JobSnapshot(
            rows_total=self._batch.num_rows,
            rows_done=totals.num_finished,
            rows_failed=totals.num_failed,
            elapsed_seconds=now - self._begin,
            run_seconds=now - self._ready_at if self._ready_at else 0.0,
            replicas=replicas,
            rows_resumed=self._before.num_finished,
        )

    def report(self, plan: RunPlan, replicas: Sequence[ReplicaReport]) -> JobReport:
        totals = self._journal.totals
        ready_at = self._ready_at or self._begin
        return JobReport(
            plan=plan,
            num_rows=self._batch.num_rows,
            num_succeeded=totals.num_succeeded,
            num_resumed=self._before.num_finished,
            failures=totals.failures,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.output_tokens,
            run_prompt_tokens=totals.prompt_tokens - self._before.prompt_tokens,
            run_output_tokens=totals.output_tokens - self._before.output_tokens,
            start_seconds=ready_at - self._begin,
            run_seconds=(self._done_at or ready_at) - ready_at,
            replicas=tuple(replicas),
        )
