"""Claim: what is predicted before a run is what comes out.

    python -m bench.prediction [--repeats 3] [--rows 48] [--parts kv speed]

``kv``: planned KV tokens against what the engine reports, for three models and two layouts.
``speed``: the machine is measured as ``elbowroom profile`` does, right before each layout runs at
tight memory (full copies hold 4 rows of 1,024 tokens); the prediction that ``run`` writes into its
report is compared with the outcome in it. The machine changes its speed between runs, so it is
measured anew for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from tools.make_model import make_model

from bench.common import (
    BUILD,
    bench_facts,
    memory_for_rows,
    run_elbowroom,
    write_requests,
    write_result,
)
from elbowroom.app.machine import split_cores
from elbowroom.profiling.machine import measure_machine

LAYOUTS = ("none", "mapped", "streamed")
MODELS = {"llama": (2, 256, 704), "qwen3": (6, 128, 320), "mistral": (4, 256, 512)}
"""Layers, hidden and feed-forward sizes."""

LEAST_DIFFERENCE = 0.10
"""Layouts that are closer than this are not ranked."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--parts", nargs="+", default=["kv", "speed"])
    args = parser.parse_args()
    if "kv" in args.parts:
        write_result("prediction_kv", compare_kv())
    if "speed" in args.parts:
        write_result("prediction_speed", compare_speed(args.repeats, args.rows))


def compare_kv() -> dict[str, Any]:
    rows = []
    for architecture, (layers, hidden, width) in MODELS.items():
        model = BUILD / f"prediction-{architecture}"
        if not (model / "config.json").exists():
            make_model(model, architecture, layers, hidden, width)
        requests = write_requests(BUILD / "warm-up.jsonl", 2)
        for pool in ("none", "mapped"):
            output = BUILD / "prediction.jsonl"
            command = [
                *(sys.executable, "-m", "elbowroom", "run", "--model", str(model)),
                *("--input", str(requests), "--output", str(output), "--replicas", "2"),
                *("--memory", "96MiB", "--pool", pool, "--served-model-name", "bench"),
                *("--max-model-len", "1024", "--restart", "--order", "input"),
            ]
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
            report = json.loads(output.with_suffix(".report.json").read_text())
            budget = report["plan"]["budget"]
            block_bytes = budget["kv_bytes_per_token"] * budget["block_tokens"]
            predicted = budget["kv_bytes"] // block_bytes * budget["block_tokens"]
            engine = [replica["num_kv_tokens"] for replica in report["replicas"]]
            rows.append({"model": architecture, "pool": pool, "predicted": predicted})
            rows[-1]["engine"] = engine
            print(rows[-1], flush=True)
    errors = [abs(row["predicted"] / tokens - 1) for row in rows for tokens in row["engine"]]
    return {"largest_error": max(errors), "runs": rows}


def compare_speed(repeats: int, num_rows: int) -> dict[str, Any]:
    requests = write_requests(BUILD / "requests.jsonl", num_rows)
    warm_up = write_requests(BUILD / "warm-up.jsonl", 4)
    memory_bytes = memory_for_rows(bench_facts(), 4)
    run_elbowroom(warm_up, "none", memory_bytes)  # discard the first run
    rounds = []
    for number in range(repeats):
        rounds.append({pool: measure(requests, pool, memory_bytes) for pool in LAYOUTS})
        print(f"round {number}: {rounds[-1]}", flush=True)
    return {
        "rows": num_rows,
        "error": {
            pool: statistics.median(r[pool]["predicted"] / r[pool]["outcome"] - 1 for r in rounds)
            for pool in LAYOUTS
        },
        "pairs_ranked": sum(ranked(r, *pair) is not None for r in rounds for pair in pairs()),
        "pairs_ranked_wrong": sum(ranked(r, *pair) is False for r in rounds for pair in pairs()),
        "rounds": rounds,
    }


def measure(requests: Path, pool: str, memory_bytes: int) -> dict[str, float]:
    """Output tokens per second, predicted and in fact."""
    machine = BUILD / "this-machine.toml"
    machine.write_text(measure_machine(split_cores(2)).to_toml())
    report = run_elbowroom(requests, pool, memory_bytes, "--cluster", str(machine))
    prediction = report["plan"]["prediction"]
    assert prediction["output_tokens"] == report["output_tokens"]
    return {
        "predicted": prediction["output_tokens"] / prediction["seconds"],
        "outcome": report["output_tokens_per_second"],
    }


def pairs() -> list[tuple[str, str]]:
    return list(combinations(LAYOUTS, 2))


def ranked(of_round: dict[str, dict[str, float]], one: str, other: str) -> bool | None:
    """Whether the faster of two was predicted to be; None if they are too close to say."""
    outcome = of_round[one]["outcome"] / of_round[other]["outcome"]
    if abs(outcome - 1) <= LEAST_DIFFERENCE:
        return None
    predicted = of_round[one]["predicted"] / of_round[other]["predicted"]
    return (outcome > 1) == (predicted > 1)


if __name__ == "__main__":
    main()
