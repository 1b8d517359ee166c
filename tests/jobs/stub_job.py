"""Runs a job with stub replicas as a process of its own, to be killed at will.

    python -m tests.jobs.stub_job FOLDER NUM_REPLICAS [stub options]

Reads ``FOLDER/in.jsonl`` and writes ``FOLDER/out.jsonl``, or ``.parquet`` where there is such an
input; the run directory is in ``FOLDER/run``.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from elbowroom.jobs import restarts
from elbowroom.jobs.job import Job, JobFiles, JobOptions
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from elbowroom.pool import run_dir
from tests.jobs.plans import make_plan


def main() -> int:
    folder, num_replicas, *options = sys.argv[1:]
    root = Path(folder)
    run_dir.default_root = lambda *_: root / "run"
    restarts._FIRST_DELAY_SECONDS = 0.02
    form = "parquet" if (root / "in.parquet").exists() else "jsonl"
    names = (f"out.{form}", f"err.{form}", "report.json")
    files = JobFiles(*(root / name for name in names))
    stub = [sys.executable, "-m", "tests.jobs.stub_replica", "--pids", str(root / "pids")]
    plan = make_plan(int(num_replicas), max_num_seqs=8)
    command = [*stub, "--log", str(root / "answered"), *options]
    with scanned(root / f"in.{form}", JobOptions()) as rows:
        job = Job(plan, rows, files, {"model": "stub"}, JobOptions(max_restarts=1000))
        report = asyncio.run(run_job(job, command))
    return 3 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
