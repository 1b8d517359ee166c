"""Claim: shipping makes a job's tail cheap, and costs nothing where there is none.

    python -m bench.tail [--repeats 3]

Two replicas of the bench model stream over a link that is throttled to 1 GB/s, with and without
shipping, in turns. ``heavy tail``: lengths of outputs follow a Pareto distribution, so that a few
rows go on long after the others. ``no tail``: all outputs are equally long and fill the replicas
to the end. Told are the whole job, and the time from 90 % of the rows done to all done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from itertools import count
from pathlib import Path
from typing import Any

from bench.common import (
    BUILD,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    bench_facts,
    bench_model,
    memory_for_rows,
    random_prompt,
    request_line,
    with_link,
    write_lines,
    write_result,
)
from elbowroom.app.batch import iter_batch
from elbowroom.app.machine import split_cores
from elbowroom.engine.vllm_seam.worker import LINK_VARIABLE
from elbowroom.jobs.journal import COMMIT_SECONDS
from elbowroom.profiling.machine import measure_machine

BYTES_PER_SECOND = 1e9
NUM_ROWS = 64
MODES = {"streamed": False, "shipped": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ[LINK_VARIABLE] = str(BYTES_PER_SECOND)
    cluster = BUILD / "throttled.toml"
    cluster.write_text(with_link(measure_machine(split_cores(2)), BYTES_PER_SECOND).to_toml())
    jobs = {
        "heavy tail": write_rows(BUILD / "tail.jsonl", heavy_tail()),
        "no tail": write_rows(BUILD / "even.jsonl", [96] * NUM_ROWS),
    }
    run(jobs["no tail"], False, cluster)  # the first run is discarded
    write_result("tail", {name: compare(job, args.repeats, cluster) for name, job in jobs.items()})


def compare(requests: Path, repeats: int, cluster: Path) -> dict[str, Any]:
    rounds = []
    for number in range(repeats):
        rounds.append({mode: run(requests, ships, cluster) for mode, ships in MODES.items()})
        print(f"{requests.stem}, round {number}: {rounds[-1]}", flush=True)
    # Equal rows end together: what they take from 90 % done is less than the journal resolves.
    has_tail = rounds[0]["streamed"]["tail_seconds"] > COMMIT_SECONDS
    gains = {
        name: statistics.median(r["streamed"][name] / r["shipped"][name] for r in rounds)
        for name in ("run_seconds", "tail_seconds")[: 1 + has_tail]
    }
    return {"shipping_gains": gains, "rounds": rounds}


def run(requests: Path, ships: bool, cluster: Path) -> dict[str, Any]:
    """Seconds of the job and of its tail, and what the pool did."""
    output = BUILD / "tail-out.jsonl"
    rows = iter_batch(
        bench_model(),
        requests,
        output,
        memory=memory_for_rows(bench_facts(), 24),
        replicas=2,
        pool="shipped" if ships else "streamed",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        served_model_names=("bench",),
        prefix_caching=False,
        restart=True,
        cluster=str(cluster),
    )
    done_at = []
    for row in rows:
        assert row["response"]["status_code"] == 200, row
        done_at.append(time.monotonic())
    report = json.loads(output.with_suffix(".report.json").read_text())
    pools = [replica["pool"] for replica in report["replicas"]]
    return {
        "run_seconds": report["run_seconds"],
        "tail_seconds": done_at[-1] - done_at[int(0.9 * len(done_at))],
        "predicted_seconds": report["plan"]["prediction"]["seconds"],
        "ship_below_rows": report["plan"]["shares"][0]["ship_below_rows"],
        **{
            name: sum(pool[name] for pool in pools)
            for name in ("streamed_iterations", "shipped_iterations", "shipped_rows")
        },
    }


def heavy_tail() -> list[int]:
    """Pareto with a shape of 1.1 above 16 tokens, at most 384: most are short."""
    chance = random.Random(0)
    return [min(384, int(16 * chance.paretovariate(1.1))) for _ in range(NUM_ROWS)]


def write_rows(path: Path, outputs: list[int]) -> Path:
    chance = random.Random(0)
    prompts = (random_prompt(chance, 32, 64) for _ in outputs)
    return write_lines(path, map(request_line, count(), prompts, outputs))


if __name__ == "__main__":
    main()
