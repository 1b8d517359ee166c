"""Claim: files and journal keep up with any engine: lines checked, rows kept and published.

    python -m bench.jobs_throughput [--rows 1000000] [--repeats 3]

``check``: one pass over lines of 1 KB without a model, as every run makes before it starts.
``run``: a whole job with stub replicas that answer at once, so that all its time is ours: rows
through dispatcher, sockets, journal and publish. Memory is the runner's peak. The floor of both is
reading the file once, and for ``run`` writing the results twice (journal, output) with fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.jobs.plans import make_plan

from elbowroom.jobs.check import check_file
from elbowroom.jobs.job import Job, JobFiles, JobOptions
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned

LINE_BYTES = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--run-rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("check", "run"), help="measure it here, once")
    parser.add_argument("--path", type=Path)
    args = parser.parse_args()
    if args.part:
        measure_here(args.part, args.path)
        return
    from bench.common import BUILD, write_result  # not where memory is measured: it brings torch

    folder = BUILD / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    checked = write_lines(folder / "check.jsonl", args.rows)
    write_lines(folder / "in.jsonl", args.run_rows)
    rounds = []
    for number in range(args.repeats):
        rounds.append(
            {
                "read": measure_read(checked, args.rows),
                "check": measure("check", checked, args.rows),
                "run": measure("run", folder, args.run_rows),
            }
        )
        print(f"round {number}: {rounds[-1]}", flush=True)
    result = {
        f"{part}_rows_per_second": statistics.median(r[part]["rows_per_second"] for r in rounds)
        for part in ("read", "check", "run")
    }
    peak = max(r["check"]["peak_bytes"] for r in rounds)
    write_result(
        "jobs_throughput",
        {"rows": args.rows, "run_rows": args.run_rows, **result, "check_peak_bytes": peak}
        | {"run_peak_bytes": max(r["run"]["peak_bytes"] for r in rounds), "rounds": rounds},
    )


def write_lines(path: Path, num_rows: int) -> Path:
    """Requests of 1 KB, each with a prompt of its own."""
    with path.open("w") as file:
        for index in range(num_rows):
            body = {"model": "m", "prompt": f"{index} ", "max_tokens": 8}
            line = {"custom_id": f"row-{index}", "method": "POST", "url": "/v1/completions"}
            missing = LINE_BYTES - 1 - len(json.dumps({**line, "body": body}))
            body["prompt"] = f"{index} " + "word " * (missing // 5) + "x" * (missing % 5)
            file.write(json.dumps({**line, "body": body}) + "\n")
    return path


def measure_read(path: Path, num_rows: int) -> dict[str, Any]:
    """The floor: how fast Python reads the lines."""
    begin = time.perf_counter()
    with path.open("rb") as file:
        assert sum(1 for _ in file) == num_rows
    return {"rows_per_second": num_rows / (time.perf_counter() - begin)}


def measure(part: str, path: Path, num_rows: int) -> dict[str, Any]:
    """One part in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "bench.jobs_throughput", "--part", part, "--path", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak_bytes = map(float, done.stdout.split())
    return {"rows_per_second": num_rows / seconds, "peak_bytes": peak_bytes}


def measure_here(part: str, path: Path) -> None:
    begin = time.perf_counter()
    if part == "check":
        assert check_file(path, None, None, RowLimits()).num_problems == 0
    else:
        files = JobFiles(*(path / name for name in ("out", "err", "report.json")))
        stub = [sys.executable, "-m", "tests.jobs.stub_replica"]
        options = JobOptions(restart=True)
        plan = make_plan(2, max_num_seqs=256)
        with scanned(path / "in.jsonl", options) as rows:
            asyncio.run(run_job(Job(plan, rows, files, {}, options), stub))
    print(time.perf_counter() - begin, peak_bytes())


def peak_bytes() -> int:
    """Peak memory of this process alone: getrusage includes the parent's memory at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
