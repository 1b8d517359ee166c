"""Claim: nothing that was fast is slower than it was at an earlier commit.

    python -m bench.against COMMIT [--repeats 5] [--parts check run start]

``check``: 200,000 lines of 1 KB. ``run``: 50,000 rows through a job with stub replicas that answer
at once. ``start``: the demo's model on two replicas with a mapped pool and 4 rows, from the command
to its end; the machine has been measured before. Both commits run with this environment, in turns;
each figure is the median over rounds of how many times as fast this working tree is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import BUILD, ROOT, write_result
from bench.jobs_throughput import write_lines

CHECK_ROWS, RUN_ROWS, START_ROWS = 200_000, 50_000, 4
DEMO = ROOT / "examples" / "demo"

Part = Callable[[Path], float]
"""Seconds that a checkout takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["check", "run", "start"])
    args = parser.parse_args()
    folder = BUILD / "against"
    folder.mkdir(parents=True, exist_ok=True)
    before = checkout(args.commit)
    checked = write_lines(folder / "check.jsonl", CHECK_ROWS)
    write_lines(folder / "in.jsonl", RUN_ROWS)
    parts: dict[str, Part] = {
        "check": lambda tree: seconds_of(tree, "check", checked),
        "run": lambda tree: seconds_of(tree, "run", folder),
        "start": lambda tree: start_seconds(tree, folder),
    }
    result: dict[str, object] = {"against": args.commit}
    for name in args.parts:
        for tree in (before, ROOT):
            parts[name](tree)  # discarded: files come into memory
        rounds = [(parts[name](before), parts[name](ROOT)) for _ in range(args.repeats)]
        times = statistics.median(then / now for then, now in rounds)
        result[name] = {"times_as_fast": times, "seconds_before_and_now": rounds}
        print(f"{name}: {times:.3f}x as fast; {rounds}", flush=True)
    write_result("against", result)


def checkout(commit: str) -> Path:
    tree = BUILD / "checkouts" / commit
    if not tree.exists():
        command = ["git", "worktree", "add", "--detach", str(tree), commit]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return tree


def seconds_of(tree: Path, part: str, path: Path) -> float:
    """One part of ``bench.jobs_throughput``, which measures itself."""
    command = ["-m", "bench.jobs_throughput", "--part", part, "--path", str(path)]
    return float(python(tree, *command).split()[0])


def start_seconds(tree: Path, folder: Path) -> float:
    lines = (DEMO / "requests.jsonl").read_text().splitlines()[:START_ROWS]
    (folder / "start.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model", str(DEMO / "model"), "--served-model-name", "demo", "--restart"]
    flags += ["--input", str(folder / "start.jsonl"), "--output", str(folder / "start.out.jsonl")]
    flags += ["--replicas", "2", "--pool", "mapped", "--memory", "160MiB"]
    is_old = not (tree / "src" / "elbowroom" / "__main__.py").exists()
    begin = time.perf_counter()
    python(tree, "-m", "elbowroom.cli" if is_old else "elbowroom", "run", *flags)
    return time.perf_counter() - begin


def python(tree: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{tree / 'src'}:{tree}"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return done.stdout


if __name__ == "__main__":
    main()
