"""Progress of a running or interrupted job, from its journal."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from elbowroom.jobs.journal_reader import JournalReader
from elbowroom.jobs.progress import clock_text

State = Literal["running", "interrupted", "finished"]


@dataclass(frozen=True)
class JobStatus:
    """Rows and tokens of the whole job; rates and times are those of the current run."""

    folder: str
    state: State
    num_rows: int
    num_succeeded: int
    failures: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    pid: int | None
    num_replicas: int | None
    elapsed_seconds: float | None
    output_tokens_per_second: float | None
    seconds_left: float | None

    @property
    def num_finished(self) -> int:
        return self.num_succeeded + sum(self.failures.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "num_finished": self.num_finished}


def job_status(journal: JournalReader) -> JobStatus:
    """Status of a job. Reads no more than counts, so it may be called while the job runs."""
    totals, facts = journal.totals(), journal.facts()
    num_rows = int(facts.get("num_rows", 0))
    is_running = journal.is_running()
    state: State = "running" if is_running else "interrupted"
    if 0 < num_rows <= totals.num_finished:
        state = "finished"
    elapsed = per_second = left = None
    if is_running and "started_at" in facts:
        elapsed = max(0.0, time.time() - facts["started_at"])
        run_seconds = time.time() - (facts["ready_at"] or time.time())
        num_done = totals.num_finished - facts["num_resumed"]
        if run_seconds > 0 and num_done > 0:
            per_second = (totals.output_tokens - facts["resumed_output_tokens"]) / run_seconds
            left = (num_rows - totals.num_finished) * run_seconds / num_done
    return JobStatus(
        folder=str(journal.folder),
        state=state,
        num_rows=num_rows,
        num_succeeded=totals.num_succeeded,
        failures=totals.failures,
        prompt_tokens=totals.prompt_tokens,
        output_tokens=totals.output_tokens,
        pid=facts.get("pid") if is_running else None,
        num_replicas=facts.get("num_replicas") if is_running else None,
        elapsed_seconds=elapsed,
        output_tokens_per_second=per_second,
        seconds_left=left,
    )


def print_status(console: Console, status: JobStatus) -> None:
    table = Table(show_header=False, box=None)
    failed = ", ".join(f"{count} {code}" for code, count in sorted(status.failures.items()))
    rows = f"{status.num_finished} of {status.num_rows} finished"
    state = f"{status.state} (process {status.pid})" if status.pid else status.state
    table.add_row("state", state)
    table.add_row("rows", rows + (f"; failed: {failed}" if failed else ""))
    table.add_row("tokens", f"{status.prompt_tokens} prompt, {status.output_tokens} output")
    if status.elapsed_seconds is not None:
        table.add_row("elapsed", clock_text(status.elapsed_seconds))
    if status.output_tokens_per_second is not None and status.seconds_left is not None:
        if status.output_tokens or not status.num_succeeded:  # some jobs generate nothing
            table.add_row("output tokens/s", f"{status.output_tokens_per_second:.1f}")
        table.add_row("time left", clock_text(status.seconds_left))
    if status.state == "interrupted":
        table.add_row("to resume", "run the same command again, without --restart")
    console.print(table)
