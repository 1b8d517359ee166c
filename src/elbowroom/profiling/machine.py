"""Measurement of this machine's devices, all at once, as a cluster."""

from __future__ import annotations

import importlib.util
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from elbowroom.core import host
from elbowroom.core.cluster import Cluster, Device, Link, MatmulPoint, Rate
from elbowroom.core.errors import MeasuringError
from elbowroom.core.model import DTYPE_BYTES
from elbowroom.core.units import GIB
from elbowroom.profiling.child_log import child_log

BUDGET_SECONDS = 30.0
"""Longest time for a measurement, even on a slow or busy machine."""

_COPY_SECONDS, _SPARE_SECONDS = 3.0, 4.0
"""Parts of the budget: for copies, and for answers to arrive and processes to end."""

DEVICE_COMMAND = (sys.executable, "-m", "elbowroom.profiling.device")

MEMORY_FRACTION = 0.8
"""Fraction of the machine's memory for all engines together; system and processes need the rest."""

ASSUMED_MEMORY_BYTES = 8 * GIB
"""Memory of a machine that does not tell."""

ITERATION_SECONDS = 1.6e-3
ROW_SECONDS = 5e-5
ENGINE_LAYER_SECONDS = 7.5e-4
"""vLLM's own time for an iteration, for each of its rows and for each layer: eager Python.

Measured with vLLM 0.32 on one core per replica, of an AMD EPYC. Iterations and rows were measured
with models that are too small to take time (hidden size 64): 1.67 and 2.64 ms for 4 and 16 rows of
one layer. Layers were measured with a model of 8 layers and hidden size 2048, whose weights push
the interpreter out of the caches: 44 ms of an engine's thread for 4 rows, of which 34.5 are what
``profile`` sees. (17 tiny layers: 0.35 ms each.)
"""

UNCERTAINTY = 0.15
"""Relative error of times predicted from these measurements, against whole runs.

Measured by ``bench/prediction.py``.
"""

_SOURCES = {
    "matmul": "products in decoder layers (hidden 2048, FFN 5632), all devices; median",
    "memory_bandwidth": "the same with one row: weight bytes per second",
    "attention_bandwidth": "attention of 24 rows over 512 tokens each: KV bytes per second",
    "attention_flops": "causal attention over 512 tokens",
    "elementwise_bandwidth": "norms, rotary embedding, activation and residuals of 1,024 rows",
    "layer_seconds": "the same of one row, and 0.75 ms of vLLM",
    "links.bandwidth": "memory-to-memory copies of 64 MiB, all devices at once",
    "iteration_seconds, row_seconds": "vLLM 0.32 on this kind of machine, by a tiny model",
}


def measure_machine(
    cores: Sequence[Sequence[int]],
    dtype: str = "bfloat16",
    seconds: float = BUDGET_SECONDS,
    command: Sequence[str] = DEVICE_COMMAND,
) -> Cluster:
    """Measure a cluster with one device per group of cores, as fast as it computes in ``dtype``.

    Takes about ten seconds and at most ``seconds``: a slow machine is measured with fewer rows.
    Raises MeasuringError when a measuring process ends or does not answer in time; what it printed
    is in a file that the message names.
    """
    if importlib.util.find_spec("torch") is None:
        raise MeasuringError("PyTorch is not installed: pip install 'elbowroom[cpu]'")
    until = time.monotonic() + seconds
    workers: list[subprocess.Popen[bytes]] = []
    with child_log("measuring") as log:
        try:
            for group in cores:
                device = [",".join(map(str, group)), str(1 / len(cores)), dtype]
                workers.append(_start([*command, *device], log))
            for worker in workers:
                _answer(worker, until)
            for_layers = until - time.monotonic() - _COPY_SECONDS - _SPARE_SECONDS
            layers = _measure(workers, "layers", for_layers, until)
            copies = _measure(workers, "copy", _COPY_SECONDS, until)
        except OSError as error:
            raise MeasuringError(f"a measuring process cannot be talked to: {error}") from error
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
    devices = [{**rates, "copy": rate} for rates, rate in zip(layers, copies, strict=True)]
    return _cluster(devices, len(cores[0]), dtype)


def _start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process in its own session: this one handles a Ctrl-C in the terminal."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=log, bufsize=0, start_new_session=True
    )


def _measure(
    workers: Sequence[subprocess.Popen[bytes]], name: str, seconds: float, until: float
) -> list[Any]:
    """Run one measurement, on all devices at the same time."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{name} {max(1.0, seconds):.1f}\n".encode())
    return [_answer(worker, until) for worker in workers]


def _answer(worker: subprocess.Popen[bytes], until: float) -> Any:
    """The next line of a worker, as JSON. Raises MeasuringError if none comes in time."""
    assert worker.stdout is not None
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, until - time.monotonic())):
                raise MeasuringError("a measuring process did not answer in time")
            read = worker.stdout.read(65536)
            if not read:
                raise MeasuringError(f"a measuring process ended with code {worker.wait()}")
            line += read
    try:
        return json.loads(line)
    except ValueError as error:
        raise MeasuringError(f"a measuring process said {line[:80]!r}") from error


def format_cores(number: int) -> str:
    return "1 core" if number == 1 else f"{number} cores"


def _cluster(devices: Sequence[dict[str, Any]], num_cores: int, dtype: str) -> Cluster:
    """A cluster from the means over devices, which are assumed equal."""

    def mean(name: str) -> float:
        return float(sum(device[name] for device in devices) / len(devices))

    tables = [device["matmul"] for device in devices]
    points = tuple(
        MatmulPoint(rows[0][0], sum(rate for _, rate in rows) / len(rows))
        for rows in zip(*tables, strict=False)  # a device out of time has fewer
    )
    flops = Rate(2 * points[-1].rows * points[-1].elements_per_second)
    # Without prompts long enough to be timed, attention is assumed as fast as products.
    has_prefill = all("prefill" in device for device in devices)
    memory = host.memory_bytes() or ASSUMED_MEMORY_BYTES
    link = Link("shared memory", len(devices), Rate(mean("copy")), 0.0)
    return Cluster(
        name="this-machine",
        num_devices=len(devices),
        device=Device(
            name=format_cores(num_cores),
            memory_bytes=memory // len(devices),
            memory_fraction=MEMORY_FRACTION,
            flops=flops,
            flops_fp8=flops,
            memory_bandwidth=Rate(DTYPE_BYTES[dtype] * points[0].elements_per_second),
            attention_flops=Rate(mean("prefill")) if has_prefill else flops,
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
        sources={**_SOURCES, "dtype": dtype},
    )
