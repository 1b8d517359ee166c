"""Measures the devices of this machine, all at once, and writes them down as a cluster."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from elbowroom.core.cluster import Cluster, Device, Link, MatmulPoint, Rate
from elbowroom.core.errors import ElbowroomError

MEMORY_FRACTION = 0.8
"""Of the machine's memory, for all engines together: the rest is for the system and processes."""

ITERATION_SECONDS = 1.6e-3
ROW_SECONDS = 5e-5
ENGINE_LAYER_SECONDS = 7.5e-4
"""What vLLM itself takes of an iteration, of each of its rows and of each layer: eager Python.

Measured with vLLM 0.32 on one core per replica, of an AMD EPYC. Iterations and rows by models that
are too small to take time (hidden size 64): 1.67 and 2.64 ms for 4 and 16 rows of one layer. Layers
by one of 8 layers and hidden size 2048, whose weights push the interpreter out of the caches: 44 ms
of an engine's thread for 4 rows, of which 34.5 are what ``profile`` sees. (17 tiny layers: 0.35 ms
each.)
"""

UNCERTAINTY = 0.15
"""Of times made of these measurements, against whole runs: ``bench/prediction.py``."""

_SOURCES = {
    "matmul": "bf16 products in decoder layers (hidden 2048, FFN 5632), all devices; median",
    "memory_bandwidth": "the same with one row: weight bytes per second",
    "attention_bandwidth": "attention of 24 rows over 512 tokens each: KV bytes per second",
    "attention_flops": "causal attention over 512 tokens",
    "elementwise_bandwidth": "norms, rotary embedding, activation and residuals of 1,024 rows",
    "layer_seconds": "the same of one row, and 0.75 ms of vLLM",
    "links.bandwidth": "memory-to-memory copies of 64 MiB, all devices at once",
    "iteration_seconds, row_seconds": "vLLM 0.32 on this kind of machine, by a tiny model",
}


def measure_machine(cores: Sequence[Sequence[int]]) -> Cluster:
    """A cluster with one device per group of cores. Takes about twenty seconds.

    Raises ElbowroomError when a measuring process fails.
    """
    workers = [_start(group, 1 / len(cores)) for group in cores]
    try:
        for worker in workers:
            _answer(worker)
        layers, copies = _measure(workers, "layers"), _measure(workers, "copy")
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    devices = [{**rates, "copy": rate} for rates, rate in zip(layers, copies, strict=True)]
    return _cluster(devices, len(cores[0]))


def _start(cores: Sequence[int], share: float) -> subprocess.Popen[str]:
    device = [",".join(map(str, cores)), str(share)]
    command = [sys.executable, "-m", "elbowroom.profiling.device", *device]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _measure(workers: Sequence[subprocess.Popen[str]], name: str) -> list[Any]:
    """One measurement, on all devices at the same time."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{name}\n")
        worker.stdin.flush()
    return [_answer(worker) for worker in workers]


def _answer(worker: subprocess.Popen[str]) -> Any:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise ElbowroomError(
            f"a measuring process ended with code {worker.wait()}: run `elbowroom profile` to see "
            f"what it prints"
        )
    return json.loads(line)


def _cluster(devices: Sequence[dict[str, Any]], num_cores: int) -> Cluster:
    """The means over devices, as they are taken to be equal."""

    def mean(name: str) -> float:
        return float(sum(device[name] for device in devices) / len(devices))

    tables = [device["matmul"] for device in devices]
    points = tuple(
        MatmulPoint(rows[0][0], sum(rate for _, rate in rows) / len(rows))
        for rows in zip(*tables, strict=True)
    )
    flops = Rate(2 * points[-1].rows * points[-1].elements_per_second)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    link = Link("shared memory", len(devices), Rate(mean("copy")), 0.0)
    return Cluster(
        name="this-machine",
        num_devices=len(devices),
        device=Device(
            name=f"{num_cores} core(s) of {platform.processor() or platform.machine()}",
            memory_bytes=memory // len(devices),
            memory_fraction=MEMORY_FRACTION,
            flops=flops,
            flops_fp8=flops,
            memory_bandwidth=Rate(2 * points[0].elements_per_second),
            attention_flops=Rate(mean("prefill")),
            attention_bandwidth=Rate(mean("decode")),
            elementwise_bandwidth=Rate(mean("elementwise")),
            layer_seconds=mean("launch") + ENGINE_LAYER_SECONDS,
            iteration_seconds=ITERATION_SECONDS,
            row_seconds=ROW_SECONDS,
            copies_overlap=False,
            maps_peers=True,
            matmul=points,
        ),
        links=(link,) if len(devices) > 1 else (),
        uncertainty=UNCERTAINTY,
        sources=_SOURCES,
    )
