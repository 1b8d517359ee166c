"""The machine we run on, as a cluster: measured once and kept, or assumed; and its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

from elbowroom.app.assumed import assumed_device
from elbowroom.app.gpu_machine import assumed_gpus, check_gpus, free_bytes, gpus_here, on_gpus
from elbowroom.core import host
from elbowroom.core.cluster import Cluster, Link, Rate
from elbowroom.core.cluster_file import is_preset, read_cluster
from elbowroom.core.errors import InputError, MeasuringError, OutputError
from elbowroom.core.files import read_json, write_text
from elbowroom.core.gpus import Gpu
from elbowroom.core.units import GIB, format_bytes
from elbowroom.plans.pool import RunPlan
from elbowroom.profiling.machine import (
    ASSUMED_MEMORY_BYTES,
    MEMORY_FRACTION,
    format_cores,
    measure_machine,
)

THIS_MACHINE = "this-machine"

ENGINE_BYTES = 5 * GIB // 4
"""What the two processes of an engine hold besides weights, workspace and KV cache.

With vLLM 0.32: 0.5 and 0.6 GiB of memory of their own, and 0.2 GiB of libraries.
"""

_FREE_FRACTION = 0.9
"""Share of the free memory that engines may take; the rest is for the runner and for others."""

DIVIDED_UNCERTAINTY = 0.35
"""Assumed error of times on parts of a device that was measured whole."""

MOST_PARTS = 8
"""A CPU is compared with its halves, and with its cores if there are no more than so many."""

Say = Callable[[str], None]


def quiet(_: str) -> None:
    """Say nothing."""


def find_cluster(
    name: str,
    cores: Sequence[Sequence[int]] | None = None,
    dtype: str = "bfloat16",
    say: Say = quiet,
) -> Cluster:
    """A preset, a file, or ``this-machine`` with one device per group of cores.

    A machine is measured when it is first asked for, in each dtype, and kept in the user's cache.
    A cache that cannot be used costs a measurement each time, and nothing else. Groups that are the
    same cores are measured once, and share them. Raises InputError for a cluster that is not there,
    MeasuringError when this machine cannot be measured.
    """
    if name != THIS_MACHINE:
        return read_cluster(name)
    asked = cores or split_cores(len(host.cores()))
    groups = tuple(dict.fromkeys(map(tuple, asked)))
    cluster = _measured_once(groups, dtype, say)
    if len(groups) == len(asked):
        return cluster
    return divided(cluster, len(asked), cluster.device.name)


def find_engine_cluster(
    name: str, cores: Sequence[Sequence[int]], dtype: str, say: Say = quiet
) -> Cluster:
    """What ``find_cluster`` finds, on the GPUs that are there if the engine computes on GPUs.

    Raises MeasuringError for GPUs of which no cluster tells.
    """
    gpus = gpus_here()
    if not gpus:
        return find_cluster(name, cores, dtype, say)
    if name == THIS_MACHINE:
        raise MeasuringError("GPUs are not measured: --cluster h100-1, say, predicts their times")
    return on_gpus(read_cluster(name), gpus, len(cores))


def _measured_once(groups: Sequence[Sequence[int]], dtype: str, say: Say) -> Cluster:
    path = cache_path(groups, dtype)
    if (kept := _read_kept(path)) is not None:
        return kept
    where = f"kept in {path}" if path else "not kept: there is no home folder"
    say(f"measuring this machine in {dtype} once, about ten seconds; {where}")
    cluster = measure_machine(groups, dtype)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, cluster.to_toml())
        except (OSError, OutputError) as error:
            say(f"the measurement is not kept: {error}")
    return cluster


@dataclass(frozen=True)
class Machines:
    """Clusters to choose from: the first on which something fits is taken.

    Without measurements, layouts are compared by assumed rates, which say nothing about times.
    """

    clusters: tuple[Cluster, ...]
    is_measured: bool = True


def find_machines(
    name: str,
    num_devices: int | None,
    memory_bytes: int | None,
    dtype: str,
    calibrate: Path | None = None,
    say: Say = quiet,
    runs_here: bool = False,
) -> Machines:
    """A cluster by its name, with ``memory_bytes`` for each device, or else its own.

    This machine is measured as it is to be divided, and has the memory that is free. Where
    ``num_devices`` is None it is one device, all of its cores, or one of each socket, near to its
    memory. Parts of one device, which share what was measured, are there to compare with. A file
    that describes this machine (``runs_here``) stands for any number of such devices. ``calibrate``
    is for ``calibrated``. Raises InputError for more memory than a preset's device has.
    """
    gpus = gpus_here() if runs_here or name == THIS_MACHINE else ()
    if gpus:
        return _gpu_machines(name, gpus, num_devices or len(gpus), memory_bytes, calibrate, say)
    if name != THIS_MACHINE:
        cluster = _calibrated(read_cluster(name), calibrate)
        if runs_here:
            return Machines((_with_memory(_of_devices(cluster, num_devices), memory_bytes),))
        there = cluster.device.memory_bytes
        if is_preset(name) and (memory_bytes or 0) > there:
            raise InputError(
                f"--memory asks for {format_bytes(memory_bytes or 0)} of each {cluster.device.name}"
                f", which has {format_bytes(there)}: lower it, or describe the device in a file"
            )
        return Machines((cluster if memory_bytes is None else cluster.with_memory(memory_bytes),))
    cores = split_cores(num_devices or len(host.memory_nodes()))
    is_measured = True
    try:
        cluster = find_cluster(name, cores, dtype, say)
    except Exception as error:  # whatever it is, layouts can be compared without
        say(f"not measured, so no times are predicted: {error}")
        cluster, is_measured = assumed_machine(cores), False
    clusters = [_calibrated(cluster, calibrate)]
    num_cores = len(cores[0])
    if num_devices is None and len(cores) == 1 and num_cores > 1:
        parts = sorted({2, num_cores} if num_cores <= MOST_PARTS else {2})
        clusters += [
            divided(clusters[0], number, format_cores(num_cores // number)) for number in parts
        ]
    return Machines(tuple(_with_memory(cluster, memory_bytes) for cluster in clusters), is_measured)


def _gpu_machines(
    name: str,
    gpus: Sequence[Gpu],
    num_devices: int,
    memory_bytes: int | None,
    calibrate: Path | None,
    say: Say,
) -> Machines:
    """The GPUs that are there: assumed, or like those of a cluster with a name."""
    is_known = name != THIS_MACHINE
    if is_known:
        cluster = on_gpus(_calibrated(read_cluster(name), calibrate), gpus, num_devices)
    else:
        say("GPUs are not measured, so no times are predicted (--cluster h100-1, say, has them)")
        cluster = assumed_gpus(gpus, num_devices)
    memory = free_bytes(gpus, num_devices) if memory_bytes is None else memory_bytes
    check_gpus(gpus, num_devices, memory)
    return Machines((cluster.with_memory(memory),), is_known)


def cache_path(cores: Sequence[Sequence[int]], dtype: str = "bfloat16") -> Path | None:
    """Where the measurements lie of this kind of CPU, with its cores split in this way."""
    folder = host.cache_folder()
    if folder is None:
        return None
    facts = f"{host.cpu_name()} {[tuple(group) for group in cores]}"
    digest = blake2b(facts.encode(), digest_size=4).hexdigest()
    return folder / "elbowroom" / f"machine-{len(cores)}x{len(cores[0])}-{digest}-{dtype}.toml"


def assumed_machine(cores: Sequence[Sequence[int]]) -> Cluster:
    """A machine of which nothing is known but its cores: good to compare layouts, not for times.

    A core is taken to compute 50 GFLOP/s and to read 5 GB/s, as those of small servers do.
    """
    per_device = len(cores[0])
    device = assumed_device(
        format_cores(per_device),
        (host.memory_bytes() or ASSUMED_MEMORY_BYTES) // len(cores),
        MEMORY_FRACTION,
        50e9 * per_device,
        5e9 * per_device,
        layer_seconds=1e-3,
        iteration_seconds=2e-3,
        row_seconds=5e-5,
        copies_overlap=False,
    )
    bandwidth = device.memory_bandwidth
    links = (Link("shared memory", len(cores), bandwidth, 0.0),) if len(cores) > 1 else ()
    return Cluster(THIS_MACHINE, len(cores), device, links, uncertainty=1.0)


def divided(cluster: Cluster, num_devices: int, name: str) -> Cluster:
    """The cluster as more devices, called ``name``: each has its part of every rate.

    What an engine takes per iteration, row and layer stays: it does not share that work.
    """
    device, parts = cluster.device, num_devices / cluster.num_devices

    def part(rate: Rate) -> Rate:
        return replace(rate, peak=rate.peak / parts)

    part_of_device = replace(
        device.with_rates(part, parts),
        name=name,
        memory_bytes=int(device.memory_bytes / parts),
    )
    link = Link("shared memory", num_devices, part_of_device.memory_bandwidth, 0.0)
    return replace(
        cluster,
        num_devices=num_devices,
        device=part_of_device,
        links=(link,),
        uncertainty=max(cluster.uncertainty, DIVIDED_UNCERTAINTY),
    )


def free_device_bytes(num_replicas: int) -> int | None:
    """What each of ``num_replicas`` engines may use of the memory that is free now."""
    free = host.free_memory_bytes()
    if free is None:
        return None
    return max(0, int(free * _FREE_FRACTION) // num_replicas - ENGINE_BYTES)


def calibrated(cluster: Cluster, report_path: Path) -> Cluster:
    """A cluster slowed down, or sped up, to what a run's report found against its prediction.

    Raises InputError when the report has no prediction to compare with.
    """
    report = read_json(report_path)
    predicted = (
        report.get("prediction_for_actual") or (report.get("plan") or {}).get("prediction") or {}
    )
    try:
        kind = "output" if predicted["output_tokens"] else "prompt"
        expected = predicted[f"{kind}_tokens"] / predicted["seconds"]
        factor = expected / report[f"{kind}_tokens_per_second"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{report_path} has no prediction beside its outcome: give the report.json of a run"
        ) from error
    slowed = replace(cluster.slowed(factor), uncertainty=min(0.1, cluster.uncertainty))
    note = f"a run took {factor:.3f} times as long as predicted: all device times are scaled"
    return replace(slowed, sources={**cluster.sources, "calibration": note})


def device_cores(plan: RunPlan) -> tuple[tuple[int, ...], ...]:
    """The cores of each device of a plan: those of a replica's devices are parts of its own."""
    return split_cores(plan.layout.num_devices if plan.layout else plan.num_replicas)


def _calibrated(cluster: Cluster, report_path: Path | None) -> Cluster:
    return cluster if report_path is None else calibrated(cluster, report_path)


def _of_devices(cluster: Cluster, num_devices: int | None) -> Cluster:
    """So many devices like those of the cluster, all on its nearest link."""
    number = num_devices or cluster.num_devices
    links = tuple(replace(link, num_devices=number) for link in cluster.links[:1])
    return replace(cluster, num_devices=number, links=links if number > 1 else ())


def _with_memory(cluster: Cluster, memory_bytes: int | None) -> Cluster:
    """With what was given, or what is free now; what it has where nobody tells."""
    memory = free_device_bytes(cluster.num_devices) if memory_bytes is None else memory_bytes
    return cluster if memory is None else cluster.with_memory(memory)


def split_cores(num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """The cores of this process, divided among replicas; with too few, replicas share cores.

    As many replicas as there are memory nodes have one each.
    """
    cores, nodes = host.cores(), host.memory_nodes()
    if num_replicas == len(nodes):
        return nodes
    if num_replicas > len(cores):
        return tuple((cores[rank % len(cores)],) for rank in range(num_replicas))
    bounds = [rank * len(cores) // num_replicas for rank in range(num_replicas + 1)]
    return tuple(tuple(cores[start:end]) for start, end in pairwise(bounds))


def _read_kept(path: Path | None) -> Cluster | None:
    """A kept measurement; None for one that is not there, is damaged, or cannot be read."""
    try:
        return read_cluster(path) if path is not None and path.exists() else None
    except (InputError, OSError):
        return None
