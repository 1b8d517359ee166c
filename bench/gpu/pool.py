"""What a pool costs and gives on one GPU that several processes share.

    python -m bench.gpu.pool [--layers 6] [--repeats 3] [--ranks 2 4] [--rows 1 64 512]

Decoder layers in the shape of Llama 3 70B (hidden 8192, FFN 28672) run in 2 and 4 processes at
once. Measured: seconds of an iteration with local weights, streamed and shipped at 1 to 512 rows,
and tokens/s where each process has the same memory, that of all weights and a quarter of it for KV
cache: a pool turns what it frees into rows.

All processes share one device, so links are emulated: copies go through its own memory, and kernels
of different processes take turns. Floors stand beside the results: the bytes of all weights over
the bandwidth of a copy within the device; streamed, also the borrowed bytes, written and read.

``--device cpu --small`` tries the script on a CPU and keeps no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.blocks import Shape
from bench.common import write_result
from bench.pool_group import MODES, Group, Setup, finish, group

LLAMA_70B = Shape(8192, 28672, 64, 8, 128, 512)
SMALL = Shape(256, 512, 4, 2, 64, 64)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KV_SHARE = 0.25
"""KV cache without a pool, as a share of the memory that full copies of the weights take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    shape = SMALL if args.small else LLAMA_70B
    setup = Setup(shape, args.layers, 2, max(args.rows), device=args.device)
    copied = copy_bytes_per_second(setup.shape.ffn_bytes, setup.device)
    result: dict[str, Any] = {
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": copied,
        "layers": args.layers,
        "shape": shape._asdict(),
    }
    for num_ranks in args.ranks:
        of_ranks = replace(setup, num_ranks=num_ranks, num_slots=min(2, num_ranks - 1))
        result[f"{num_ranks} processes"] = compare(of_ranks, args.rows, args.repeats, copied)
        print(json.dumps(result, indent=1), flush=True)
    if args.device != "cpu":
        write_result("gpu_pool", result)


def compare(setup: Setup, rows: Sequence[int], repeats: int, copied: float) -> dict[str, Any]:
    """Rounds in which modes alternate, all processes at work at once. The first is dropped."""
    fit = rows_that_fit(setup)
    with group(setup) as ranks:
        rounds = [
            {mode: {count: ranks.seconds(mode, count) for count in rows} for mode in MODES}
            for _ in range(repeats + 1)
        ][1:]
        capped = tokens_per_second(ranks, fit, setup.num_ranks, repeats)
    seconds = {
        mode: {count: statistics.median(r[mode][count] for r in rounds) for count in rows}
        for mode in MODES
    }
    return {
        "seconds": seconds,
        "floor_seconds": floors(setup, copied),
        "rows_at_equal_memory": fit,
        "tokens_per_second_at_equal_memory": capped,
        "pooled_over_replicated": capped["streamed"] / capped["local"],
    }


def rows_that_fit(setup: Setup) -> dict[str, int]:
    """Rows whose KV fits beside the weights of each layout, in the memory of one process."""
    shape, layers, ranks = setup.shape, setup.num_layers, setup.num_ranks
    full = layers * (shape.attention_bytes + shape.ffn_bytes)
    memory = full * (1 + KV_SHARE)
    pooled = (
        layers * (shape.attention_bytes + shape.ffn_bytes / ranks)
        + setup.num_slots * shape.ffn_bytes
    )
    of_row = layers * shape.kv_bytes_per_row
    return {
        "local": min(setup.most_rows, int((memory - full) // of_row)),
        "streamed": min(setup.most_rows, int((memory - pooled) // of_row)),
    }


def tokens_per_second(
    ranks: Group, fit: dict[str, int], num_ranks: int, repeats: int
) -> dict[str, float]:
    """A token for each row and iteration, of all processes together."""
    seconds: dict[str, list[float]] = {mode: [] for mode in fit}
    for _ in range(repeats):
        for mode, rows in fit.items():
            seconds[mode].append(ranks.seconds(mode, rows))
    return {mode: num_ranks * fit[mode] / statistics.median(seconds[mode]) for mode in fit}


def floors(setup: Setup, copied: float) -> dict[str, float]:
    """Seconds that bytes alone take at one row. A copy counts its bytes twice, read and written."""
    shape = setup.shape
    memory = 2 * copied
    weights = setup.num_ranks * setup.num_layers * (shape.attention_bytes + shape.ffn_bytes)
    borrowed = setup.num_ranks * setup.num_layers * shape.ffn_bytes * (1 - 1 / setup.num_ranks)
    return {"local": weights / memory, "streamed": (weights + 2 * borrowed) / memory}


def copy_bytes_per_second(num_bytes: int, device: str) -> float:
    """Bytes that a copy of ``num_bytes`` within a device moves in a second, each counted once."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        finish(device)
        begin = time.perf_counter()
        target.copy_(source)
        finish(device)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
