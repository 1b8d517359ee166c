"""Measures one device: products, copies, attention, small kernels. Runs as a process of its own.

    python -m elbowroom.profiling.device CORES

reads the name of a measurement per line and answers with one JSON line each, so that all devices of
a machine can be measured at the same time: they share caches and memory.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

HIDDEN, WIDTH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 2048, 5632, 64, 32, 8
MATRICES = 32
"""Of 23 MB, or what else is measured: as many as do not stay in a large cache, as layers do not."""

MATMUL_ROWS = (1, 4, 8, 16, 32, 64, 256, 1024)
COPY_BYTES = 64 * 1024**2
CONTEXT = 512
DECODE_ROWS = 16
PREFILL_TOKENS = 512
ELEMENTWISE_ROWS = 256
_LEAST_SECONDS = 0.25
_LEAST_REPEATS = 5


def main() -> None:
    cores = [int(core) for core in sys.argv[1].split(",")]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    measurements: dict[str, Callable[[], object]] = {
        "matmul": matmul_rates,
        "copy": copy_bytes_per_second,
        "decode": decode_bytes_per_second,
        "prefill": prefill_flops_per_second,
        "launch": lambda: small_kernels_seconds(1),
        "elementwise": elementwise_bytes_per_second,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(measurements[line.strip()]()), flush=True)


def matmul_rates() -> list[tuple[int, float]]:
    """Weight elements per second by rows, of bf16 matrices that are packed once."""
    weight = _random(WIDTH, HIDDEN)
    weights = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for _ in range(MATRICES)]
    rates = []
    for rows in MATMUL_ROWS:
        x = _random(rows, HIDDEN)

        def multiply(number: int, x: torch.Tensor = x) -> None:
            torch.ops.mkldnn._linear_pointwise(x, weights[number % MATRICES], None, "none", [], "")

        rates.append((rows, WIDTH * HIDDEN / _median_seconds(multiply)))
    return rates


def copy_bytes_per_second() -> float:
    """From memory to memory, of pages that exist."""
    sources = [torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(MATRICES)]
    target = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    return COPY_BYTES / _median_seconds(lambda number: target.copy_(sources[number % MATRICES]))


def decode_bytes_per_second() -> float:
    """KV bytes read by attention of one query per row and head over the row's context.

    The queries of a group are rows of one product, as in an engine's kernel.
    """
    queries = _random(DECODE_ROWS, NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM)
    caches = [
        [_random(DECODE_ROWS, NUM_KV_HEADS, CONTEXT, HEAD_DIM) for _ in range(2)]
        for _ in range(MATRICES)
    ]

    def attend(number: int) -> None:
        keys, values = caches[number % MATRICES]
        scores = queries @ keys.transpose(-1, -2)
        scores.float().softmax(-1).to(torch.bfloat16) @ values

    kv_bytes = sum(cache.nbytes for cache in caches[0])
    return kv_bytes / _median_seconds(attend)


def prefill_flops_per_second() -> float:
    """Causal attention over a prompt: 4 FLOPs per element of a head, query and earlier key."""
    shape = (1, NUM_HEADS, PREFILL_TOKENS, HEAD_DIM)
    queries, keys, values = (_random(*shape) for _ in range(3))

    def attend(_: int) -> None:
        functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    flops = 4 * HEAD_DIM * NUM_HEADS * PREFILL_TOKENS**2 / 2
    return flops / _median_seconds(attend)


def small_kernels_seconds(rows: int) -> float:
    """Norms with residuals, rotary embedding and activation of one decoder layer."""
    x, gate_and_up, norm = _random(rows, HIDDEN), _random(rows, 2 * WIDTH), _random(HIDDEN)

    def layer(_: int) -> None:
        for _part in range(2):
            functional.rms_norm(x + x, (HIDDEN,), norm)
        half = HIDDEN // 2
        torch.cat([x[:, :half] - x[:, half:], x[:, half:] + x[:, :half]], dim=1)
        functional.silu(gate_and_up[:, :WIDTH]) * gate_and_up[:, WIDTH:]

    return _median_seconds(layer)


def elementwise_bytes_per_second() -> float:
    """Of the same kernels, with more rows than a cache holds; bytes as the cost model counts."""
    num_bytes = ELEMENTWISE_ROWS * (12 * HIDDEN + 3 * WIDTH) * 2
    return num_bytes / small_kernels_seconds(ELEMENTWISE_ROWS)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def _median_seconds(run: Callable[[int], object]) -> float:
    """Of at least 5 runs and a quarter of a second, after one that is discarded."""
    run(0)
    seconds: list[float] = []
    while len(seconds) < _LEAST_REPEATS or sum(seconds) < _LEAST_SECONDS:
        begin = time.perf_counter()
        run(len(seconds) + 1)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
