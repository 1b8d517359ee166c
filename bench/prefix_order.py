"""Claim: by itself, a run finds nearly the prefixes that it would find in a file sorted for it.

    python -m bench.prefix_order [--repeats 3] [--rows 400]

On a file of 400 rows with 8 shared 200-token prefixes in random order, prefix-cache hit tokens are
at least 90 % of what a sorted file gets, and total time is better than with ``--order input``.

Three runs in turns: ``auto`` and ``input`` on the shuffled file, ``sorted`` on the file sorted by
prefix, in its order. Two replicas, mapped pool, 8 to 16 output tokens. A replica's cache holds 4
rows and not all prefixes: 36 blocks, where the 8 prefixes fill 48. Ratios are taken within a round,
and the median over rounds is reported; total seconds go from the command to its end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import BUILD, bench_facts, memory_for_rows, run_elbowroom, write_result
from elbowroom.core.model import ModelFacts

NUM_ROWS = 400
NUM_PREFIXES = 8
PREFIX_TOKENS = 200
ROW_TOKENS = 288  # 200 shared, at most 60 own and 16 of output, in whole blocks of 32
ROWS_IN_CACHE = 4
NUM_REPLICAS = 2  # of ``run_elbowroom``
VOCABULARY = range(2, 4096)


Figures = dict[str, float]
"""What one run gave."""


class Case(NamedTuple):
    """A file, and the order in which its rows are worked on."""

    requests: Path
    order: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows of the batch")
    args = parser.parse_args()
    rows = make_rows(args.rows)
    in_order = write_rows(BUILD / "prefixes-sorted.jsonl", rows)
    random.Random(1).shuffle(rows)
    shuffled = write_rows(BUILD / "prefixes-shuffled.jsonl", rows)
    cases = {
        "auto": Case(shuffled, "auto"),
        "input": Case(shuffled, "input"),
        "sorted": Case(in_order, "input"),
    }
    memory_bytes = mapped_memory_for_rows(bench_facts(), ROWS_IN_CACHE)
    warm_up = write_rows(BUILD / "warm-up.jsonl", rows[:4])
    measure(Case(warm_up, "input"), memory_bytes)  # discard the first run
    rounds = []
    for number in range(args.repeats):
        rounds.append({name: measure(case, memory_bytes) for name, case in cases.items()})
        print(f"round {number}: {rounds[-1]}", flush=True)
    settings = {"rows": args.rows, "prefixes": NUM_PREFIXES, "memory": memory_bytes}
    write_result("prefix_order", {**settings, **compare(rounds)})


def make_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chat requests, sorted by their system message of 200 tokens; 20 to 60 tokens are their own.

    Ids do not say where a row stands. End of text is ignored, so that every run gives as much.
    """
    generator = random.Random(seed)
    prefixes = [_words(generator, PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
    rows = []
    for index in range(num_rows):
        messages = [
            {"role": "system", "content": prefixes[index * NUM_PREFIXES // num_rows]},
            {"role": "user", "content": _words(generator, generator.randint(20, 60))},
        ]
        body = {
            "model": "bench",
            "messages": messages,
            "max_tokens": generator.randint(8, 16),
            "ignore_eos": True,
            "temperature": 0,
        }
        line = {"custom_id": f"row-{index}", "method": "POST", "url": "/v1/chat/completions"}
        rows.append({**line, "body": body})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def mapped_memory_for_rows(model: ModelFacts, num_rows: int) -> int:
    """Memory at which a replica of the mapped pool, which owns its share only, holds so many."""
    others = sum(model.ffn_bytes()) * (NUM_REPLICAS - 1) // NUM_REPLICAS
    return memory_for_rows(model, num_rows, ROW_TOKENS) - others


def measure(case: Case, memory_bytes: int) -> Figures:
    begin = time.monotonic()
    # Without --restart, a second run would find its rows in the journal and compute nothing.
    report = run_elbowroom(
        case.requests, "mapped", memory_bytes, "--order", case.order, "--restart"
    )
    total_seconds = time.monotonic() - begin
    assert report["num_succeeded"] == report["num_rows"], report["failures"]
    assert report["num_resumed"] == 0
    replicas = report["replicas"]
    return {
        "total_seconds": total_seconds,
        "run_seconds": report["run_seconds"],
        "output_tokens": report["output_tokens"],
        "kv_tokens": replicas[0]["num_kv_tokens"],
        "preemptions": sum(replica["num_preemptions"] for replica in replicas),
        "prefix_hit_tokens": sum(replica["prefix_hit_tokens"] for replica in replicas),
        "prefix_query_tokens": sum(replica["prefix_query_tokens"] for replica in replicas),
    }


def compare(rounds: list[dict[str, Figures]]) -> dict[str, Any]:
    return {
        "hit_tokens_auto_over_sorted": ratio(rounds, "prefix_hit_tokens", "auto", "sorted"),
        "hit_tokens_input_over_sorted": ratio(rounds, "prefix_hit_tokens", "input", "sorted"),
        "total_seconds_auto_over_input": ratio(rounds, "total_seconds", "auto", "input"),
        "run_seconds_auto_over_input": ratio(rounds, "run_seconds", "auto", "input"),
        "run_seconds_auto_over_sorted": ratio(rounds, "run_seconds", "auto", "sorted"),
        "rounds": rounds,
    }


def ratio(rounds: list[dict[str, Figures]], value: str, one: str, other: str) -> float:
    return statistics.median(r[one][value] / r[other][value] for r in rounds)


def _words(generator: random.Random, num_tokens: int) -> str:
    return " ".join(f"w{generator.choice(VOCABULARY)}" for _ in range(num_tokens))


if __name__ == "__main__":
    main()
