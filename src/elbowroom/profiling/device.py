"""Process that measures one device with decoder layers as an engine runs them.

    python -m elbowroom.profiling.device CORES SHARE DTYPE

It reads the name of a measurement and its seconds per line and answers with one JSON line each, so
that all devices of a machine can be measured at the same time: they share caches and memory. SHARE
is this device's fraction of the machine, which bounds what it allocates. A measurement that has
used up its seconds ends with what it has, so on a slow machine with fewer numbers of rows.

Parts are timed where they stand in a layer, not in loops of their own: in a model each part finds
caches that others have filled, which makes a batch of one row take half as long again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import torch
from torch.nn import functional

from elbowroom.core import host
from elbowroom.engine.vllm_seam.kernels import Linear, Pack, find_kernel

HIDDEN, WIDTH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 2048, 5632, 64, 32, 8
DECODE_ROWS = (1, 4, 8, 16, 24, 32, 64)
PREFILL_ROWS = (256, 1024)
ALL_ROWS = (*DECODE_ROWS, *PREFILL_ROWS)
CONTEXT = 512
KV_ROWS = 24
"""Batch at which the bandwidth of decode attention is measured."""

COPY_BYTES = 64 * 1024**2
MOST_LAYERS, LEAST_LAYERS = 8, 2
MOST_COPIES, LEAST_COPIES = 32, 4
"""Bounds for the numbers of layers (90 MB each) and of copy sources (64 MB each).

The upper ones are too much for a large cache, as a model's layers are.
"""

_SWEEPS = 3
_LEAST_SECONDS = 0.25
_LEAST_REPEATS = 3

Attention = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


class LayerSeconds(NamedTuple):
    """Seconds of one decoder layer by part."""

    products: float
    attention: float
    small_kernels: float


class DecoderLayer(NamedTuple):
    """Packed weights and a KV cache. The down projection is in halves, as the engine packs it."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    gate_and_up: torch.Tensor
    down: tuple[torch.Tensor, torch.Tensor]
    kv: tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    cores, share = [int(core) for core in sys.argv[1].split(",")], float(sys.argv[2])
    dtype = getattr(torch, sys.argv[3])
    host.die_with_parent()
    host.pin(0, cores)
    torch.set_num_threads(len(cores))
    measurements: dict[str, Callable[[float], object]] = {
        "layers": lambda s: measure_layers(_part_of(share, LEAST_LAYERS, MOST_LAYERS), dtype, s),
        "copy": lambda s: copy_bytes_per_second(_part_of(share, LEAST_COPIES, MOST_COPIES), s),
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(json.dumps(measurements[name](float(seconds))), flush=True)


def measure_layers(num_layers: int, dtype: torch.dtype, seconds: float = inf) -> dict[str, object]:
    """Measure rates as ``core.cluster.Device`` has them: of products by rows, and of other parts.

    Takes ``seconds`` or little more: rows that would take longer are left out.
    """
    until = time.perf_counter() + seconds
    pack, linear = find_kernel(dtype)
    layers = _random_layers(num_layers, pack, dtype)
    parts = _layer_seconds(layers, linear, until)
    weights = (layers[0].qkv, layers[0].out, layers[0].gate_and_up, *layers[0].down)
    elements = sum(weight.numel() for weight in weights)
    of_decode = max(rows for rows in parts if rows <= KV_ROWS)
    kv_bytes = sum(cache[:of_decode].nbytes for cache in layers[0].kv)
    most = max(parts)
    # Bytes as the cost model counts them.
    elementwise_bytes = dtype.itemsize * most * (12 * HIDDEN + 3 * WIDTH)
    measured: dict[str, object] = {
        "matmul": [(rows, elements / of_rows.products) for rows, of_rows in parts.items()],
        "decode": kv_bytes / parts[of_decode].attention,
        "launch": parts[1].small_kernels,
        "elementwise": elementwise_bytes / parts[most].small_kernels,
    }
    if most in PREFILL_ROWS:
        flops = 4 * HEAD_DIM * NUM_HEADS * most * min(most, CONTEXT) / 2
        measured["prefill"] = flops / parts[most].attention
    return measured


def copy_bytes_per_second(num_sources: int, most_seconds: float = inf) -> float:
    """Bytes per second copied from memory to memory, between pages that exist."""
    until = time.perf_counter() + most_seconds
    sources = [torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(num_sources)]
    target = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    seconds: list[float] = []
    while not _is_enough(seconds) and (len(seconds) < 2 or time.perf_counter() < until):
        begin = time.perf_counter()
        target.copy_(sources[len(seconds) % num_sources])
        seconds.append(time.perf_counter() - begin)
    return COPY_BYTES / statistics.median(seconds[1:])


def _layer_seconds(
    layers: list[DecoderLayer], linear: Linear, until: float
) -> dict[int, LayerSeconds]:
    """Median seconds of every part by rows, over layers that follow each other.

    Each number of rows has its turn several times, because the machine's speed changes between
    them. Those that would last beyond ``until``, judging by fewer rows, are left out; one row never
    is.
    """
    inputs = {rows: _random(layers[0].norm.dtype, rows, HIDDEN) for rows in ALL_ROWS}
    samples: dict[int, list[LayerSeconds]] = {}
    for _ in range(_SWEEPS):
        pace = 0.0  # seconds per row, of the sizes so far
        for rows, x in inputs.items():
            if samples and time.perf_counter() + 2 * pace * rows > until:
                break
            attend = _decode_attention if rows in DECODE_ROWS else _prefill_attention
            begin = time.perf_counter()
            _run_layer(x, layers[-1], linear, attend)  # discarded: fresh memory
            turn: list[LayerSeconds] = []
            while not _is_enough([sum(sample) for sample in turn]):
                turn.append(_run_layer(x, layers[len(turn) % len(layers)], linear, attend))
                if time.perf_counter() > until:
                    break
            pace = (time.perf_counter() - begin) / (len(turn) + 1) / rows
            samples.setdefault(rows, []).extend(turn)
    return {
        rows: LayerSeconds(*map(statistics.median, zip(*of_rows, strict=True)))
        for rows, of_rows in samples.items()
    }


def _run_layer(
    x: torch.Tensor, layer: DecoderLayer, linear: Linear, attend: Attention
) -> LayerSeconds:
    """Run one decoder layer. Each part's output goes into the next part, as in a model."""
    clock = time.perf_counter
    begin = clock()
    normed = functional.rms_norm(x + x, (HIDDEN,), layer.norm)
    at_qkv = clock()
    qkv = linear(normed, layer.qkv)
    at_rotary = clock()
    half = HIDDEN // 2
    rotated = torch.cat(
        [qkv[:, :half] - qkv[:, half:HIDDEN], qkv[:, :HIDDEN:2] + qkv[:, 1:HIDDEN:2]], 1
    )
    at_attention = clock()
    attended = attend(rotated, layer.kv)
    at_out = clock()
    out = linear(attended, layer.out)
    at_norm = clock()
    normed = functional.rms_norm(out + x, (HIDDEN,), layer.norm)
    at_gate = clock()
    gate_and_up = linear(normed, layer.gate_and_up)
    at_activation = clock()
    inner = functional.silu(gate_and_up[:, :WIDTH]) * gate_and_up[:, WIDTH:]
    at_down = clock()
    down = linear(inner[:, : WIDTH // 2], layer.down[0])
    down += linear(inner[:, WIDTH // 2 :], layer.down[1])
    end = clock()
    return LayerSeconds(
        products=at_rotary - at_qkv + at_norm - at_out + at_activation - at_gate + end - at_down,
        attention=at_out - at_attention,
        small_kernels=at_qkv
        - begin
        + at_attention
        - at_rotary
        + at_gate
        - at_norm
        + at_down
        - at_activation,
    )


def _decode_attention(queries: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Attention of one query per row and head over the row's context, of at most KV_ROWS rows.

    The queries of a group are rows of one product, as in an engine's kernel.
    """
    rows = min(len(queries), KV_ROWS)
    keys, values = (cache[:rows] for cache in kv)
    grouped = queries[:rows].reshape(rows, NUM_KV_HEADS, -1, HEAD_DIM)
    scores = (grouped @ keys.transpose(-1, -2)).float().softmax(-1)
    queries = queries.clone()
    queries[:rows] = (scores.to(queries.dtype) @ values).reshape(rows, HIDDEN)
    return queries


def _prefill_attention(queries: torch.Tensor, _: object) -> torch.Tensor:
    """Causal attention over prompts of CONTEXT tokens, or a shorter one."""
    heads = queries.view(-1, min(len(queries), CONTEXT), NUM_HEADS, HEAD_DIM).transpose(1, 2)
    attended = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return attended.transpose(1, 2).reshape(len(queries), HIDDEN)


def _random_layers(num_layers: int, pack: Pack, dtype: torch.dtype) -> list[DecoderLayer]:
    """Equal layers, each in its own memory; copies, because drawing numbers takes longer."""
    first = _random_layer(pack, dtype)
    return [first, *(_copied(first) for _ in range(num_layers - 1))]


def _random_layer(pack: Pack, dtype: torch.dtype) -> DecoderLayer:
    def weight(num_out: int, num_in: int) -> torch.Tensor:
        return pack(_random(dtype, num_out, num_in))

    cache = (KV_ROWS, NUM_KV_HEADS, CONTEXT, HEAD_DIM)
    return DecoderLayer(
        norm=_random(dtype, HIDDEN),
        qkv=weight(HIDDEN + 2 * NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        out=weight(HIDDEN, HIDDEN),
        gate_and_up=weight(2 * WIDTH, HIDDEN),
        down=(weight(HIDDEN, WIDTH // 2), weight(HIDDEN, WIDTH // 2)),
        kv=(_random(dtype, *cache), _random(dtype, *cache)),
    )


def _copied(layer: DecoderLayer) -> DecoderLayer:
    return DecoderLayer(
        norm=layer.norm.clone(),
        qkv=layer.qkv.clone(),
        out=layer.out.clone(),
        gate_and_up=layer.gate_and_up.clone(),
        down=(layer.down[0].clone(), layer.down[1].clone()),
        kv=(layer.kv[0].clone(), layer.kv[1].clone()),
    )


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _is_enough(seconds: list[float]) -> bool:
    return len(seconds) >= _LEAST_REPEATS and sum(seconds) >= _LEAST_SECONDS


def _part_of(share: float, least: int, most: int) -> int:
    """A number from ``least`` to ``most``: large where few devices share the machine."""
    return max(least, min(most, int(share * most * 2)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
