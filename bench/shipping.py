"""Claim: few rows are cheaper shipped than streamed, by as much as the planner says.

    python -m bench.shipping [--repeats 5]

Decoder layers of the bench model (8 of them, hidden 2048, FFN 5632, with attention over 512 tokens
and the engine's packed kernel) run in two processes of one core each, without an engine around
them. Every round runs one iteration after the other with local weights, streamed and shipped, both
replicas at once, at several batches; links are throttled to 1 GB/s, or not at all. The crossover of
streamed and shipped stands beside B_th, which the planner makes of this machine's profile.

The floor of a streamed iteration is the fetch: borrowed bytes / bandwidth. That of a shipped one is
the local iteration: the same products run, if elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.common import bench_facts, with_link, write_result
from elbowroom.core.cluster import Cluster
from elbowroom.planner import split_cores
from elbowroom.planning.cost import CostModel
from elbowroom.planning.modes import PoolTimes
from elbowroom.planning.pool import SHIP_ROWS, plan_shares
from elbowroom.pool.pool import Pool
from elbowroom.pool.run_dir import run_directory
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.profiling.device import (
    CONTEXT,
    HEAD_DIM,
    HIDDEN,
    NUM_KV_HEADS,
    WIDTH,
    find_kernel,
)
from elbowroom.profiling.machine import measure_machine

NUM_LAYERS, NUM_RANKS = 8, 2
MODES = ("local", "streamed", "shipped")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
LINKS = {"throttled to 1 GB/s": 1e9, "not throttled": float("inf")}
BUFFER_BYTES = SHIP_ROWS * HIDDEN * 2
ALWAYS = 10**6


class PackedLinear(nn.Module):
    """The engine's kernel; the weight is packed once by the pool, or here."""

    def __init__(self, num_out: int, num_in: int, kernel: Any) -> None:
        super().__init__()
        self.kernel = kernel
        weight = torch.randn(num_out, num_in).to(torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.kernel(x, self.weight)
        return out


class Mlp(nn.Module):
    """Gated, the down projection in halves as the engine packs it."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.gate_and_up = PackedLinear(2 * WIDTH, HIDDEN, kernel)
        self.down = nn.ModuleList(PackedLinear(HIDDEN, WIDTH // 2, kernel) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_and_up = self.gate_and_up(x)
        inner = functional.silu(gate_and_up[:, :WIDTH]) * gate_and_up[:, WIDTH:]
        halves = inner.chunk(2, dim=1)
        out: torch.Tensor = self.down[0](halves[0]) + self.down[1](halves[1])
        return out


class Block(nn.Module):
    """A decoder layer whose rows each read CONTEXT tokens of keys and values."""

    def __init__(self, kernel: Any, pack: Any, kv: list[torch.Tensor]) -> None:
        super().__init__()
        self.qkv = PackedLinear(HIDDEN + 2 * NUM_KV_HEADS * HEAD_DIM, HIDDEN, kernel)
        self.out = PackedLinear(HIDDEN, HIDDEN, kernel)
        for linear in (self.qkv, self.out):
            linear.weight.copy_(pack(linear.weight).view(linear.weight.shape))
        self.kv = kv
        self.mlp = Mlp(kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        normed = functional.rms_norm(x, (HIDDEN,))
        queries = self.qkv(normed)[:, :HIDDEN].view(rows, NUM_KV_HEADS, -1, HEAD_DIM)
        keys, values = (cache[:rows] for cache in self.kv)
        scores = (queries @ keys.transpose(-1, -2)).float().div(HEAD_DIM**0.5).softmax(-1)
        x = x + self.out((scores.to(torch.bfloat16) @ values).reshape(rows, HIDDEN))
        out: torch.Tensor = x + self.mlp(functional.rms_norm(x, (HIDDEN,)))
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with torch.inference_mode():
            work(int(args.worker[0]), Path(args.worker[1]), float(args.worker[2]))
        return
    machine = measure_machine(split_cores(NUM_RANKS))
    result = {name: compare(bps, args.repeats, machine) for name, bps in LINKS.items()}
    write_result("shipping", result)


def compare(bytes_per_second: float, repeats: int, machine: Cluster) -> dict[str, Any]:
    """Seconds of an iteration by mode and rows: medians of rounds in which modes alternate."""
    with run_directory() as run_dir:
        workers = [start(rank, run_dir, bytes_per_second) for rank in range(NUM_RANKS)]
        try:
            for worker in workers:
                assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
            rounds = [
                {mode: {rows: ask(workers, mode, rows) for rows in ROWS} for mode in MODES}
                for _ in range(repeats + 1)
            ][1:]  # the first is discarded
            alone = {mode: ask(workers[:1], mode, 1) for mode in MODES}
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
    seconds = {
        mode: {rows: statistics.median(r[mode][rows] for r in rounds) for rows in ROWS}
        for mode in MODES
    }
    found = crossover(seconds["streamed"], seconds["shipped"])
    planned = planned_threshold(machine, bytes_per_second)
    outcome = {
        "seconds": seconds,
        "alone_at_1_row": alone,
        "ship_over_stream_at_1_row": seconds["streamed"][1] / seconds["shipped"][1],
        "ship_over_local_at_1_row": seconds["shipped"][1] / seconds["local"][1],
        "stream_over_ship_at_64_rows": seconds["shipped"][64] / seconds["streamed"][64],
        "crossover_rows": found,
        "planned_rows": planned,
    }
    print(json.dumps(outcome, indent=1), flush=True)
    return outcome


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
    return PoolTimes(CostModel(bench_facts(), cluster), NUM_RANKS, 1).threshold_batch(CONTEXT)


def start(rank: int, run_dir: Path, bytes_per_second: float) -> subprocess.Popen[str]:
    worker = ("--worker", str(rank), str(run_dir), str(bytes_per_second))
    command = [sys.executable, "-m", "bench.shipping", *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def ask(workers: Sequence[subprocess.Popen[str]], mode: str, rows: int) -> float:
    """Seconds of an iteration, the mean of all workers at work at once."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{mode} {rows}\n")
        worker.stdin.flush()
    return statistics.mean(float(worker.stdout.readline()) for worker in workers if worker.stdout)


def work(rank: int, run_dir: Path, bytes_per_second: float) -> None:
    """Answer each line, a mode and a number of rows, with the median seconds of an iteration."""
    os.sched_setaffinity(0, split_cores(NUM_RANKS)[rank])
    torch.set_num_threads(1)
    pack, kernel = find_kernel()
    torch.manual_seed(0)
    cache = (max(ROWS), NUM_KV_HEADS, CONTEXT, HEAD_DIM)
    kv = [[torch.randn(cache).to(torch.bfloat16) for _ in range(2)] for _ in range(NUM_LAYERS)]
    models = {}
    for mode in MODES:
        folder = run_dir / (f"{mode}-{rank}" if mode == "local" else mode)
        folder.mkdir(exist_ok=True)
        blocks = [Block(kernel, pack, kv[layer]) for layer in range(NUM_LAYERS)]
        join_pool(blocks, mode, rank, folder, bytes_per_second, pack)
        models[mode] = blocks
    print("ready", flush=True)
    for line in sys.stdin:
        mode, rows = line.split()
        print(iteration_seconds(models[mode], int(rows)), flush=True)


def join_pool(
    blocks: Sequence[Block],
    mode: str,
    rank: int,
    folder: Path,
    bytes_per_second: float,
    pack: Any,
) -> None:
    ships = mode == "shipped"
    shares = plan_shares(
        (1,) * NUM_LAYERS,
        1 if mode == "local" else NUM_RANKS,
        "streamed",
        1,
        ship_bytes=BUFFER_BYTES if ships else 0,
        ship_below_rows=ALWAYS if ships else 0,
    )
    share = shares[rank % len(shares)]
    store = SharedMemoryStore(folder, rank)
    pool = Pool(
        share,
        store,
        lambda weight: pack(weight).view(weight.shape),
        run_dir=folder,
        link_bytes_per_second=bytes_per_second,
    )
    for block in blocks:
        pool.add_block(block)
    pool.attach()
    pool.start()


def iteration_seconds(blocks: Sequence[Block], rows: int) -> float:
    x = torch.randn(rows, HIDDEN).to(torch.bfloat16)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < 1.0:
        begin = time.perf_counter()
        y = x
        for block in blocks:
            y = block(y)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
