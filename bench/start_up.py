"""Claim: two replicas start in at most 1.3x the time of one plain vLLM on the same cores.

    python -m bench.start_up [--repeats 3]

Both from the command to the first row that could be answered; eager, bench model, in turns.
"""

from __future__ import annotations

import argparse
import statistics

from bench.common import (
    BUILD,
    bench_facts,
    memory_for_rows,
    run_elbowroom,
    run_plain_vllm,
    write_requests,
    write_result,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    requests = write_requests(BUILD / "warm-up.jsonl", 4)
    facts = bench_facts()
    memory_bytes = memory_for_rows(facts, 4)
    kv_bytes = 4096 * facts.kv_bytes_per_token()
    rounds = []
    for number in range(args.repeats + 1):
        ours = run_elbowroom(requests, "mapped", memory_bytes)["start_seconds"]
        plain = run_plain_vllm([requests], [[0, 1]], kv_bytes, "--enforce-eager").start_seconds
        print(f"round {number}: two replicas {ours:.1f} s, one vLLM {plain:.1f} s", flush=True)
        rounds.append({"two_replicas_seconds": ours, "one_vllm_seconds": plain})
    kept = rounds[1:]  # the first run reads files into the page cache
    ratio = statistics.median(r["two_replicas_seconds"] / r["one_vllm_seconds"] for r in kept)
    write_result("start_up", {"two_replicas_over_one_vllm": ratio, "rounds": kept})


if __name__ == "__main__":
    main()
