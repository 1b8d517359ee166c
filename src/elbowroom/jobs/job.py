"""Description of a batch job: its plan, input, files and options, and who can stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from elbowroom.core.options import option
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import OnCommit
from elbowroom.jobs.journal_reader import journal_folder, place_of
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.preflight import FileSummary
from elbowroom.jobs.rows import BYTES_PER_TOKEN
from elbowroom.plans.pool import Prediction, RunPlan

Order = Literal["auto", "input"]

PredictActual = Callable[[int, int], Prediction | None]
"""Prediction from the numbers of prompt and output tokens of a whole job."""


@dataclass(frozen=True)
class JobFiles:
    """Files that a job writes. Logs go to the journal's folder unless named."""

    output: Path
    errors: Path
    report: Path
    logs: Path | None = None

    def written(self, *, has_failed: bool) -> set[str]:
        """The results of a job that has failed rows or none, as ``place_of`` names them."""
        errors = (self.errors,) if has_failed else ()
        return {place_of(path, self.output) for path in (self.output, self.report, *errors)}

    @property
    def log_folder(self) -> Path:
        return self.logs or journal_folder(self.output) / "logs"


of_job = partial(option, group="job")


@dataclass(frozen=True)
class JobOptions:
    """Options for working through the rows. ``restart`` drops what earlier runs have finished.

    ``bytes_per_token`` is what prompts are believed to have before any has finished: with a good
    guess, replicas are as full as they can be from the start.
    """

    limits: RowLimits = field(default_factory=RowLimits)
    restart: bool = of_job(False, "switch", "start over: drop what earlier runs finished")
    retry_failed: bool = of_job(False, "switch", "try rows again that failed in earlier runs")
    overwrite: bool = of_job(False, "switch", "replace files that no run of this job wrote")
    order: Order = of_job(
        "auto",
        "text",
        "in which rows are worked on (auto: long outputs first, shared prefixes together); "
        "results are in input order",
        choices=get_args(Order),
    )
    grace_seconds: float = of_job(
        5.0, "seconds", "for rows in flight after the first Ctrl-C", flag="--grace"
    )
    max_restarts: int = of_job(3, "number", "of one replica in ten minutes")
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


@dataclass(frozen=True)
class ScannedInput:
    """A batch file that has been read once, and the indices of its rows in the order of work."""

    batch: BatchFile
    order: Iterable[int]
    summary: FileSummary


@dataclass(frozen=True)
class Job:
    """Everything that a run of a job depends on.

    ``identity`` is what answers depend on: a journal with another one is refused. ``on_rows`` is
    called with rows once they are safe. At the end ``predict_actual`` predicts again, from the
    numbers of prompt and output tokens that occurred.
    """

    plan: RunPlan
    input: ScannedInput
    files: JobFiles
    identity: Mapping[str, str]
    options: JobOptions = field(default_factory=JobOptions)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    stop: StopRequest = field(default_factory=StopRequest)
    on_rows: OnCommit | None = None
    predict_actual: PredictActual | None = None

    def say(self, text: str) -> None:
        say_on(self.console, text)


def how_to_resume(is_restart: bool) -> str:
    """What to do after a job has stopped. To give --restart again would drop its rows."""
    again = "run the same command again to resume"
    return f"{again}, without --restart, which would start over" if is_restart else again


def say_on(console: Console, text: str) -> None:
    """Print a line, if there is still a terminal: it may be gone, and the job is not."""
    with suppress(Exception):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
