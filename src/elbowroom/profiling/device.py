"""Measures one device with decoder layers as an engine runs them. Runs as a process of its own.

    python -m elbowroom.profiling.device CORES SHARE

reads the name of a measurement per line and answers with one JSON line each, so that all devices of
a machine can be measured at the same time: they share caches and memory. SHARE is this device's
part of the machine, which bounds what it allocates.

Parts are timed where they stand in a layer, not in loops of their own: in a model each part finds
caches that others have filled, which costs a batch of one row half as much again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

HIDDEN, WIDTH, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 2048, 5632, 64, 32, 8
DECODE_ROWS = (1, 4, 8, 16, 24, 32, 64)
PREFILL_ROWS = (256, 1024)
CONTEXT = 512
KV_ROWS = 24
"""Attention's bandwidth is taken at this batch."""

COPY_BYTES = 64 * 1024**2
MOST_LAYERS, LEAST_LAYERS = 8, 2
MOST_COPIES, LEAST_COPIES = 32, 4
"""Of 90 and 64 MB: as many as do not stay in a large cache, as layers do not."""

_SWEEPS = 3
_LEAST_SECONDS = 0.25
_LEAST_REPEATS = 3

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Pack = Callable[[torch.Tensor], torch.Tensor]
Attention = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


class LayerSeconds(NamedTuple):
    """Seconds of one decoder layer by part."""

    products: float
    attention: float
    small_kernels: float


class DecoderLayer(NamedTuple):
    """Packed weights and a KV cache. The down projection lies in halves, as the engine packs it."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    gate_and_up: torch.Tensor
    down: tuple[torch.Tensor, torch.Tensor]
    kv: tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    cores, share = [int(core) for core in sys.argv[1].split(",")], float(sys.argv[2])
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    measurements: dict[str, Callable[[], object]] = {
        "layers": lambda: measure_layers(_part_of(share, LEAST_LAYERS, MOST_LAYERS)),
        "copy": lambda: copy_bytes_per_second(_part_of(share, LEAST_COPIES, MOST_COPIES)),
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(measurements[line.strip()]()), flush=True)


def measure_layers(num_layers: int) -> dict[str, object]:
    """Rates as ``core.cluster.Device`` has them: by rows for products, one for each other part."""
    pack, linear = find_kernel()
    layers = [_random_layer(pack) for _ in range(num_layers)]
    seconds = _layer_seconds(layers, linear)
    weights = (layers[0].qkv, layers[0].out, layers[0].gate_and_up, *layers[0].down)
    elements = sum(weight.numel() for weight in weights)
    tokens = PREFILL_ROWS[-1]
    flops = 4 * HEAD_DIM * NUM_HEADS * tokens * CONTEXT / 2
    kv_bytes = sum(cache.nbytes for cache in layers[0].kv)
    elementwise_bytes = 2 * tokens * (12 * HIDDEN + 3 * WIDTH)  # as the cost model counts them
    return {
        "matmul": [(rows, elements / parts.products) for rows, parts in seconds.items()],
        "decode": kv_bytes / seconds[KV_ROWS].attention,
        "prefill": flops / seconds[tokens].attention,
        "launch": seconds[1].small_kernels,
        "elementwise": elementwise_bytes / seconds[tokens].small_kernels,
    }


def find_kernel() -> tuple[Pack, Linear]:
    """What brings a bf16 matrix [out, in] into a kernel's form, and that kernel.

    vLLM's own, which the engine runs, from its library; PyTorch's where there is none. Of few rows
    they differ by a factor of two.
    """
    package = importlib.util.find_spec("vllm")
    for folder in (package and package.submodule_search_locations) or ():
        library = Path(folder) / "_C.abi3.so"
        if library.exists() and torch.cpu._is_avx512_bf16_supported():
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    if hasattr(torch.ops._C, "weight_packed_linear"):
        return torch.ops._C.convert_weight_packed, _packed_linear
    return lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, KV_ROWS), _mkldnn_linear


def copy_bytes_per_second(num_sources: int) -> float:
    """From memory to memory, of pages that exist."""
    sources = [torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(num_sources)]
    target = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    seconds: list[float] = []
    while not _is_enough(seconds):
        begin = time.perf_counter()
        target.copy_(sources[len(seconds) % num_sources])
        seconds.append(time.perf_counter() - begin)
    return COPY_BYTES / statistics.median(seconds[1:])


def _layer_seconds(layers: list[DecoderLayer], linear: Linear) -> dict[int, LayerSeconds]:
    """The median of every part by rows, over layers that follow each other.

    Each number of rows has its turn several times: the machine's speed changes between them.
    """
    inputs = {rows: _random(rows, HIDDEN) for rows in (*DECODE_ROWS, *PREFILL_ROWS)}
    samples: dict[int, list[LayerSeconds]] = {rows: [] for rows in inputs}
    for _ in range(_SWEEPS):
        for rows, x in inputs.items():
            attend = _decode_attention if rows in DECODE_ROWS else _prefill_attention
            _run_layer(x, layers[-1], linear, attend)  # discarded: fresh memory
            turn: list[LayerSeconds] = []
            while not _is_enough([sum(sample) for sample in turn]):
                turn.append(_run_layer(x, layers[len(turn) % len(layers)], linear, attend))
            samples[rows] += turn
    return {
        rows: LayerSeconds(*map(statistics.median, zip(*of_rows, strict=True)))
        for rows, of_rows in samples.items()
    }


def _run_layer(
    x: torch.Tensor, layer: DecoderLayer, linear: Linear, attend: Attention
) -> LayerSeconds:
    """One decoder layer. What a part makes goes into the next, as in a model."""
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
    """One query per row and head, of at most KV_ROWS rows, over the row's context.

    The queries of a group are rows of one product, as in an engine's kernel.
    """
    rows = min(len(queries), KV_ROWS)
    keys, values = (cache[:rows] for cache in kv)
    grouped = queries[:rows].reshape(rows, NUM_KV_HEADS, -1, HEAD_DIM)
    scores = (grouped @ keys.transpose(-1, -2)).float().softmax(-1)
    queries = queries.clone()
    queries[:rows] = (scores.to(torch.bfloat16) @ values).reshape(rows, HIDDEN)
    return queries


def _prefill_attention(queries: torch.Tensor, _: object) -> torch.Tensor:
    """Causal attention over prompts of CONTEXT tokens, or a shorter one."""
    heads = queries.view(-1, min(len(queries), CONTEXT), NUM_HEADS, HEAD_DIM).transpose(1, 2)
    attended = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return attended.transpose(1, 2).reshape(len(queries), HIDDEN)


def _packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype)
    torch.ops._C.weight_packed_linear(out, x, packed, None, True)
    return out


def _mkldnn_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


def _random_layer(pack: Pack) -> DecoderLayer:
    def weight(num_out: int, num_in: int) -> torch.Tensor:
        return pack(_random(num_out, num_in))

    cache = (KV_ROWS, NUM_KV_HEADS, CONTEXT, HEAD_DIM)
    return DecoderLayer(
        norm=_random(HIDDEN),
        qkv=weight(HIDDEN + 2 * NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        out=weight(HIDDEN, HIDDEN),
        gate_and_up=weight(2 * WIDTH, HIDDEN),
        down=(weight(HIDDEN, WIDTH // 2), weight(HIDDEN, WIDTH // 2)),
        kv=(_random(*cache), _random(*cache)),
    )


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def _is_enough(seconds: list[float]) -> bool:
    return len(seconds) >= _LEAST_REPEATS and sum(seconds) >= _LEAST_SECONDS


def _part_of(share: float, least: int, most: int) -> int:
    """``most`` where a few devices share the machine, ``least`` where many do."""
    return max(least, min(most, int(share * most * 2)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
