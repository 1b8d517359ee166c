"""Claim: few rows are cheaper shipped than streamed, by as much as the planner says.

    python -m bench.shipping [--repeats 5]

Decoder layers of the bench model (8 of them, hidden 2048, FFN 5632, with attention over 512 tokens
and the engine's packed kernel) run in two processes of one core each, without an engine around
them. Every round runs one iteration after the other with local weights, streamed and shipped, both
replicas at once, at several batches; links are throttled to 1 GB/s, or not at all. The crossover of
streamed and shipped stands beside B_th, which the planner makes of this machine's profile.

Then one replica runs the layers that it owns while the other ships to it, to see what serving costs
the owner: its own FFN must not take longer than one FFN more.

The floor of a streamed iteration is the fetch: borrowed bytes / bandwidth. That of a shipped one is
the local iteration: the same products run, if elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Any

from bench.blocks import Shape
from bench.common import bench_facts, with_link, write_result
from bench.pool_group import MODES, Group, Setup, group
from elbowroom.app.machine import split_cores
from elbowroom.core.cluster import Cluster
from elbowroom.planning.cost import CostModel
from elbowroom.planning.pool.modes import PoolTimes
from elbowroom.profiling.device import (
    CONTEXT,
    HEAD_DIM,
    HIDDEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    WIDTH,
)
from elbowroom.profiling.machine import measure_machine

NUM_RANKS = 2
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
LINKS = {"throttled to 1 GB/s": 1e9, "not throttled": float("inf")}
SHAPE = Shape(HIDDEN, WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, CONTEXT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cores = split_cores(NUM_RANKS)
    machine = measure_machine(cores)
    setup = Setup(SHAPE, 8, NUM_RANKS, max(ROWS), cores=cores)
    result = {
        name: compare(replace(setup, bytes_per_second=link), args.repeats, machine)
        for name, link in LINKS.items()
    }
    write_result("shipping", result)


def compare(setup: Setup, repeats: int, machine: Cluster) -> dict[str, Any]:
    """Seconds of an iteration by mode and rows: medians of rounds in which modes alternate."""
    with group(setup) as ranks:
        rounds = [
            {mode: {rows: ranks.seconds(mode, rows) for rows in ROWS} for mode in MODES}
            for _ in range(repeats + 1)
        ][1:]  # the first is discarded
        alone = {mode: ranks.ask((mode, 1), None)[0].seconds for mode in MODES}
        serving = {rows: cost_of_serving(ranks, rows, repeats) for rows in (1, 16, 128)}
    seconds = {
        mode: {rows: statistics.median(r[mode][rows] for r in rounds) for rows in ROWS}
        for mode in MODES
    }
    outcome = {
        "seconds": seconds,
        "alone_at_1_row": alone,
        "ship_over_stream_at_1_row": seconds["streamed"][1] / seconds["shipped"][1],
        "ship_over_local_at_1_row": seconds["shipped"][1] / seconds["local"][1],
        "stream_over_ship_at_64_rows": seconds["shipped"][64] / seconds["streamed"][64],
        "crossover_rows": crossover(seconds["streamed"], seconds["shipped"]),
        "planned_rows": planned_threshold(machine, setup.bytes_per_second),
        "serving": serving,
    }
    print(json.dumps(outcome, indent=1), flush=True)
    return outcome


def cost_of_serving(ranks: Group, rows: int, repeats: int) -> dict[str, float]:
    """An owner's own FFN while a peer ships as many rows to it, over the same FFN undisturbed.

    Both replicas compute in either case. A ratio of 2 is a stall of one FFN.
    """
    ratios, slow = [], []
    for _ in range(repeats):
        alone, _ = ranks.ask(("own", rows), ("own", rows))
        serving, _ = ranks.ask(("own", rows), ("shipped", rows))
        ratios.append(serving.ffn_seconds / alone.ffn_seconds)
        slow.append(serving.slow_ffn_seconds / alone.ffn_seconds)
    return {"median": statistics.median(ratios), "19_of_20": statistics.median(slow)}


def crossover(streamed: dict[int, float], shipped: dict[int, float]) -> float | None:
    """The batch from which streaming is no slower; linear between those measured."""
    gaps = {rows: streamed[rows] - shipped[rows] for rows in streamed}
    for below, above in pairwise(ROWS):
        if gaps[below] > 0 >= gaps[above]:
            return below + (above - below) * gaps[below] / (gaps[below] - gaps[above])
    return None


def planned_threshold(machine: Cluster, bytes_per_second: float) -> int | None:
    """B_th of layers alone: no engine around them, no head."""
    cluster = with_link(machine, bytes_per_second) if bytes_per_second < float("inf") else machine
    device = replace(cluster.device, iteration_seconds=0.0, row_seconds=0.0)
    cluster = replace(cluster, device=device)
    return PoolTimes(CostModel(bench_facts(), cluster), NUM_RANKS, 1).threshold_batch(SHAPE.context)


if __name__ == "__main__":
    main()
