"""What a pool gives vLLM on one GPU that several replicas share.

    python -m bench.gpu.engine [--layers 16] [--replicas 4] [--rows 12] [--rounds 1]

Layers in the shape of Qwen3-8B (hidden 4096, FFN 12288, 32/8 heads) with random weights. Each
replica has the memory at which full copies hold ``--rows`` rows of 1,024 tokens. ``elbowroom run``
answers the same batch with every layout in turns: what a pool frees becomes KV cache, so more rows
run at once. Ratios are taken within a round.

All replicas share one device: copies go through its own memory, and kernels of different processes
take turns. The floor beside each result is the time to read weights and KV cache once per iteration
with all rows in flight, at the bandwidth of a copy within the device.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from tools.make_model import make_model

from bench.common import (
    BUILD,
    MAX_MODEL_LEN,
    memory_for_rows,
    run_elbowroom,
    write_requests,
    write_result,
)
from bench.gpu.pool import copy_bytes_per_second
from bench.pool_throughput import summarise
from elbowroom.core.gpus import find_gpus
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.planning.pool.shares import plan_shares

LAYOUTS = ("none", "mapped", "streamed")
MAX_NUM_BATCHED_TOKENS = 8192
MAX_NUM_SEQS = 256
GRAPHS = ("--no-enforce-eager", "-cc.mode=none", "-cc.cudagraph_mode=FULL_DECODE_ONLY")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--graphs", action="store_true", help="decode in CUDA graphs, uncompiled")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/elbowroom-bench"))
    args = parser.parse_args()
    model_dir = args.folder / f"qwen3-{args.layers}"
    if not (model_dir / "config.json").exists():
        with torch.device("cuda"):  # random numbers come faster there
            make_model(model_dir, "qwen3", args.layers, 4096, 12288, 32, 8, 4096)
    model = read_model(model_dir)
    copied = copy_bytes_per_second(1 << 30, "cuda")
    result: dict[str, Any] = {
        "gpus": [gpu.name for gpu in find_gpus()],
        "torch": torch.__version__,
        "copy_bytes_per_second": copied,
        "layers": args.layers,
        "graphs": args.graphs,
    }
    torch.cuda.empty_cache()
    for num_replicas in args.replicas:
        found = compare(model_dir, model, num_replicas, copied, args)
        result[f"{num_replicas} replicas"] = found
        for pool, one in found["floor_tokens_per_second"].items():
            print(f"{num_replicas} replicas, {pool}: at most {one:.0f} tokens/s", flush=True)
    write_result("gpu_engine", result)


def compare(
    model_dir: Path, model: ModelFacts, num_replicas: int, copied: float, args: argparse.Namespace
) -> dict[str, Any]:
    """All layouts in turns."""
    memory = memory_for_rows(
        model,
        args.rows,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
    )
    pooled_rows = args.rows + sum(model.ffn_bytes()) * (1 - 1 / num_replicas) / row_bytes(model)
    requests = write_requests(BUILD / "gpu.jsonl", int(num_replicas * pooled_rows))
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        rounds.append({})
        for pool in args.layouts:
            report = run(model_dir, requests, pool, memory, num_replicas, args.graphs)
            rounds[-1][pool] = summarise(report)
            print(f"{num_replicas} replicas, {pool}: {rounds[-1][pool]}", flush=True)
    kv = {pool: rounds[0][pool]["kv_tokens"] for pool in args.layouts}
    return {
        "memory_bytes": memory,
        "rows": int(num_replicas * pooled_rows),
        "kv_tokens": kv,
        "over_none": {
            pool: statistics.median(
                r[pool]["tokens_per_second"] / r["none"]["tokens_per_second"] for r in rounds
            )
            for pool in args.layouts
            if "none" in args.layouts
        },
        "floor_tokens_per_second": {
            pool: floor_tokens_per_second(model, num_replicas, tokens, pool, copied)
            for pool, tokens in kv.items()
        },
        "rounds": rounds,
    }


def row_bytes(model: ModelFacts) -> float:
    return MAX_MODEL_LEN * model.kv_bytes_per_token()


def floor_tokens_per_second(
    model: ModelFacts, num_replicas: int, kv_tokens: int, pool: str, copied: float
) -> float:
    """What reading alone allows: all rows in flight, each half way through its 1,024 tokens."""
    rows = min(MAX_NUM_SEQS, kv_tokens / MAX_MODEL_LEN)
    ffn = sum(model.ffn_bytes())
    moved = model.replicated_bytes() + ffn + rows * row_bytes(model) / 2
    if pool == "streamed":
        share = plan_shares(model.ffn_bytes(), num_replicas, "streamed", 2)[0]
        borrowed = sum(
            size
            for owner, size in zip(share.owners, model.ffn_bytes(), strict=True)
            if owner != share.rank
        )
        moved += 2 * borrowed  # read from the owner, and written into a slot
    return rows * 2 * copied / moved  # a copy reads and writes each byte


def run(
    model: Path, requests: Path, pool: str, memory_bytes: int, num_replicas: int, graphs: bool
) -> dict[str, Any]:
    """One ``elbowroom run``. Returns its report."""
    options = (
        *("--replicas", str(num_replicas), "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
        *(("--", *GRAPHS) if graphs else ()),
    )
    return run_elbowroom(requests, pool, memory_bytes, *options, model=model)


if __name__ == "__main__":
    main()
