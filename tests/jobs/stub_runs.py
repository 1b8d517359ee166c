"""A job with stub replicas in this process, in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elbowroom.jobs.job import Job, JobFiles, JobOptions, StopRequest
from elbowroom.jobs.journal import OnCommit
from elbowroom.jobs.journal_reader import JournalReader
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from tests.jobs.plans import make_plan, write_batch

ROOT = Path(__file__).parents[2]


class StubJob:
    """One job in a folder of its own: its files, its stub replicas, what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.run_root = folder / "run"
        self.pids = folder / "pids"
        self.results = folder / "results"
        for path in (self.run_root, self.pids, self.results):
            path.mkdir()
        self.input = folder / "batch.jsonl"
        self.files = JobFiles(
            output=self.results / "out.jsonl",
            errors=self.results / "err.jsonl",
            report=self.results / "report.json",
        )
        self.options = JobOptions(max_restarts=5)
        self.stop = StopRequest()
        self.screen = StringIO()
        self.batch(40)

    def batch(self, num_rows: int, **body: Any) -> None:
        write_batch(self.input, num_rows, **body)

    def run(
        self,
        *options: object,
        num_replicas: int = 1,
        seconds: float = 60.0,
        max_num_seqs: int = 8,
        on_rows: OnCommit | None = None,
    ) -> JobReport:
        command = [sys.executable, "-m", "tests.jobs.stub_replica", "--pids", str(self.pids)]
        plan = make_plan(num_replicas, max_num_seqs=max_num_seqs)
        screen = Console(file=self.screen, width=200)
        with scanned(self.input, self.options) as rows:
            job = Job(
                plan, rows, self.files, {"model": "stub"}, self.options, screen, self.stop, on_rows
            )
            run = run_job(job, [*command, *(str(option) for option in options)])
            return asyncio.run(asyncio.wait_for(run, seconds))

    def answers(self) -> list[dict[str, Any]]:
        return lines_of(self.files.output)

    def lives(self, replica: int) -> list[int]:
        """Process ids of a replica, one of each life."""
        return [int(line) for line in (self.pids / str(replica)).read_text().splitlines()]

    def num_finished(self) -> int:
        with JournalReader(self.files.output) as journal:
            return journal.totals().num_finished

    def check_nothing_is_left(self, published: bool = False) -> None:
        assert not list(self.run_root.iterdir()), "the run directory was left"
        left = {path.name for path in self.results.iterdir()}
        assert ("out.jsonl" in left) == published, "results of a run that failed"
        assert not any(name.startswith(".") for name in left), "half a file"
        for path in self.pids.iterdir():
            for pid in self.lives(int(path.name)):
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
