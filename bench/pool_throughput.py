"""Claim: at equal memory the pool gives more tokens per second; with ample memory it is free.

    python -m bench.pool_throughput [--repeats 3] [--parts tight ample plain]

``tight``: memory at which full copies hold 4 rows of 1,024 tokens. ``ample``: every row fits in
every layout, so batches are equal. ``plain``: vLLM's own batch runner, two engines of one core
with the same memory each, and one engine with both cores and both memories. Layouts alternate in
one run; ratios are taken within a round, and the median over rounds is reported.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import (
    BUILD,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    bench_facts,
    memory_for_rows,
    run_elbowroom,
    run_plain_vllm,
    write_requests,
    write_result,
)
from elbowroom.planning.pool.memory import workspace_bytes

LAYOUTS = ("none", "mapped", "streamed")
NUM_ROWS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["tight", "ample", "plain"])
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows of the batch")
    args = parser.parse_args()
    requests = write_requests(BUILD / "requests.jsonl", args.rows)
    warm_up = write_requests(BUILD / "warm-up.jsonl", 4)
    facts = bench_facts()
    tight_bytes = memory_for_rows(facts, 4)
    ample_bytes = memory_for_rows(facts, args.rows)
    run_elbowroom(warm_up, "none", tight_bytes)  # discard the first run
    for part in args.parts:
        if part == "plain":
            result = compare_plain(requests, tight_bytes, args.repeats)
        else:
            memory_bytes = tight_bytes if part == "tight" else ample_bytes
            result = compare(requests, memory_bytes, args.repeats)
        settings = {"rows": args.rows, "memory_of_none_for_4_rows": tight_bytes}
        write_result(f"pool_throughput_{part}", {**settings, **result})


def compare(requests: Path, memory_bytes: int, repeats: int) -> dict[str, Any]:
    """All layouts in turns, and what a streamed byte costs: the floor of streaming on one core."""
    rounds = []
    for number in range(repeats):
        bandwidth = copy_bytes_per_second()
        reports = {pool: run_elbowroom(requests, pool, memory_bytes) for pool in LAYOUTS}
        rounds.append({pool: summarise(report) for pool, report in reports.items()})
        rounds[-1]["copy_bytes_per_second"] = bandwidth
        print(f"round {number}: {rounds[-1]}", flush=True)
    floors = [max(r["streamed"]["streamed_bytes"]) / r["copy_bytes_per_second"] for r in rounds]
    losses = [r["streamed"]["run_seconds"] - r["none"]["run_seconds"] for r in rounds]
    return {
        "kv_tokens": {pool: rounds[0][pool]["kv_tokens"] for pool in LAYOUTS},
        "kv_tokens_mapped_over_none": rounds[0]["mapped"]["kv_tokens"]
        / rounds[0]["none"]["kv_tokens"],
        "mapped_over_none": ratio(rounds, "mapped", "none"),
        "streamed_over_none": ratio(rounds, "streamed", "none"),
        "streamed_loss_seconds": statistics.median(losses),
        "copy_floor_seconds": statistics.median(floors),
        "streamed_loss_over_floor": statistics.median(
            loss / floor for loss, floor in zip(losses, floors, strict=True)
        ),
        "rounds": rounds,
    }


def compare_plain(requests: Path, memory_bytes: int, repeats: int) -> dict[str, Any]:
    """Mapped pool against ``vllm run-batch`` as it comes (compiled), in turns."""
    facts = bench_facts()
    weights = facts.replicated_bytes() + sum(facts.ffn_bytes())
    kv_bytes = memory_bytes - weights - workspace_bytes(facts, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS)
    both_kv_bytes = (
        2 * memory_bytes - weights - workspace_bytes(facts, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS)
    )
    lines = requests.read_text().splitlines()
    halves = [BUILD / f"half-{index}.jsonl" for index in range(2)]
    for index, half in enumerate(halves):
        half.write_text("\n".join(lines[index::2]) + "\n")
    rounds = []
    for number in range(repeats):
        mapped = run_elbowroom(requests, "mapped", memory_bytes)
        two = run_plain_vllm(halves, [[0], [1]], kv_bytes)
        one = run_plain_vllm([requests], [[0, 1]], both_kv_bytes)
        rounds.append(
            {
                "mapped": summarise(mapped),
                "two_engines": rate(two._asdict()),
                "one_engine": rate(one._asdict()),
            }
        )
        print(f"round {number}: {rounds[-1]}", flush=True)
    return {
        "mapped_over_two_engines": ratio(rounds, "mapped", "two_engines"),
        "mapped_over_one_engine_with_everything": ratio(rounds, "mapped", "one_engine"),
        "rounds": rounds,
    }


def rate(timed: dict[str, Any]) -> dict[str, Any]:
    return {**timed, "tokens_per_second": timed["output_tokens"] / timed["run_seconds"]}


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    assert report["num_succeeded"] == report["num_rows"], report["failures"]
    return {
        "tokens_per_second": report["output_tokens_per_second"],
        "run_seconds": report["run_seconds"],
        "start_seconds": report["start_seconds"],
        "output_tokens": report["output_tokens"],
        "kv_tokens": report["replicas"][0]["num_kv_tokens"],
        "preemptions": sum(replica["num_preemptions"] for replica in report["replicas"]),
        "streamed_bytes": [replica["pool"]["streamed_bytes"] for replica in report["replicas"]],
        "wait_seconds": [replica["pool"]["wait_seconds"] for replica in report["replicas"]],
    }


def ratio(rounds: list[dict[str, Any]], one: str, other: str) -> float:
    return statistics.median(
        r[one]["tokens_per_second"] / r[other]["tokens_per_second"] for r in rounds
    )


def copy_bytes_per_second() -> float:
    """What one copy reaches while the other core copies too, as it is when replicas stream."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        return min(pool.map(_copy_on_core, range(2)))


def _copy_on_core(core: int, num_bytes: int = 69_206_016, repeats: int = 20) -> float:
    os.sched_setaffinity(0, {core})
    sources = [np.ones(num_bytes, dtype=np.uint8) for _ in range(4)]
    target = np.zeros(num_bytes, dtype=np.uint8)
    times = []
    for number in range(repeats):
        begin = time.perf_counter()
        np.copyto(target, sources[number % 4])
        times.append(time.perf_counter() - begin)
    return num_bytes / statistics.median(times)


if __name__ == "__main__":
    main()
