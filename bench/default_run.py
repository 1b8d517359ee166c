"""Claim: without any option, a run on a CPU is as fast as ``vllm run-batch`` on the same cores.

    python -m bench.default_run [--repeats 3] [--parts plain prefixes]

``plain``: 32 rows of 256 to 512 prompt and 192 to 256 output tokens. ``prefixes``: 400 rows of 8
shared prefixes of 200 tokens in random order, with 8 to 16 output tokens. Both commands have all
cores, the same dtype and as many bytes of KV cache; ``elbowroom run`` is told nothing but model,
input and output, and ``vllm run-batch`` compiles, as it does when it is told nothing.

Two figures, each the median of ratios within a round: output tokens a second while rows are
answered (the engines have started), and the same over the whole command, as a user waits for it.
Their floor is one: the same engine does the same products on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common import (
    BUILD,
    bench_model,
    random_prompt,
    request_line,
    run_plain_vllm,
    write_lines,
    write_result,
)
from bench.prefix_order import make_rows, write_rows

NUM_ROWS, NUM_PREFIX_ROWS = 32, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["plain", "prefixes"])
    args = parser.parse_args()
    files = {"plain": plain_requests(), "prefixes": prefix_requests()}
    run_default(write_lines(BUILD / "warm-up.jsonl", files["plain"].read_text().splitlines()[:2]))
    result: dict[str, Any] = {"cores": sorted(os.sched_getaffinity(0))}
    for part in args.parts:
        rounds = []
        for number in range(args.repeats):
            rounds.append(one_round(files[part]))
            print(f"{part}, round {number}: {rounds[-1]}", flush=True)
        result[part] = {
            "answering_over_vllm": ratio(rounds, "run_seconds"),
            "whole_command_over_vllm": ratio(rounds, "total_seconds"),
            "rounds": rounds,
        }
    write_result("default_run", result)


def plain_requests() -> Path:
    generator = random.Random(0)
    lines = (
        request_line(i, random_prompt(generator, 256, 512), generator.randint(192, 256))
        for i in range(NUM_ROWS)
    )
    return write_lines(BUILD / "default-plain.jsonl", served_by_folder(lines))


def prefix_requests() -> Path:
    rows = make_rows(NUM_PREFIX_ROWS)
    random.Random(1).shuffle(rows)
    path = write_rows(BUILD / "default-prefixes.jsonl", rows)
    return write_lines(path, served_by_folder(path.read_text().splitlines()))


def served_by_folder(lines: Any) -> list[str]:
    """Rows ask for the model by its folder's name: a run knows it without being told."""
    return [line.replace('"model": "bench"', f'"model": "{bench_model().name}"') for line in lines]


def one_round(requests: Path) -> dict[str, dict[str, float]]:
    ours = run_default(requests)
    begin = time.monotonic()
    theirs = run_plain_vllm(
        [requests],
        [sorted(os.sched_getaffinity(0))],
        int(ours.pop("kv_bytes")),
        served=bench_model().name,
        is_default=True,
    )
    total = time.monotonic() - begin
    assert theirs.output_tokens == ours["output_tokens"], "the same work"
    return {
        "elbowroom": ours,
        "vllm": {**theirs._asdict(), "total_seconds": total},
    }


def run_default(requests: Path) -> dict[str, float]:
    """``elbowroom run`` with nothing but files."""
    output = BUILD / "default.jsonl"
    command = [sys.executable, "-m", "elbowroom", "run", "--model", str(bench_model())]
    command += ["--input", str(requests), "--output", str(output), "--restart"]
    begin = time.monotonic()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    total = time.monotonic() - begin
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert report["num_succeeded"] == report["num_rows"], report["failures"]
    return {
        "start_seconds": report["start_seconds"],
        "run_seconds": report["run_seconds"],
        "total_seconds": total,
        "output_tokens": report["output_tokens"],
        "kv_bytes": report["plan"]["budget"]["kv_bytes"],
        "rows_at_once": report["plan"]["engine"]["max_num_seqs"],
    }


def ratio(rounds: list[dict[str, dict[str, float]]], name: str) -> float:
    """How many times as fast; both did the same work."""
    return statistics.median(r["vllm"][name] / r["elbowroom"][name] for r in rounds)


if __name__ == "__main__":
    main()
