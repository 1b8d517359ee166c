"""GPUs of this machine as a cluster: what is known of them without a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elbowroom.app.assumed import assumed_device
from elbowroom.core.cluster import Cluster, Link
from elbowroom.core.errors import InputError
from elbowroom.core.gpus import Gpu, find_gpus
from elbowroom.core.units import GIB, format_bytes
from elbowroom.jobs.identity import engine_version, is_for_gpus

GPU_ENGINE_BYTES = 3 * GIB // 2
"""What an engine takes of a GPU besides weights, workspace and KV cache.

CUDA's context and modules, cuBLAS's workspace, buffers of the sampler.
"""

_FREE_FRACTION = 0.95
"""Share of a GPU's free memory that engines may take."""

_FLOPS, _BYTES_PER_SECOND = 100e12, 1e12
"""Assumed: enough to compare layouts, not for times."""


ONE_GPU = "use --pool none, or let all replicas share one GPU with CUDA_VISIBLE_DEVICES=0"
"""What to do where no pool can be had."""


def gpus_here() -> tuple[Gpu, ...]:
    """The GPUs that the installed engine computes on; none where it computes on the CPU.

    Raises InputError for an engine for GPUs where there is none.
    """
    version = engine_version()
    if not is_for_gpus(version):
        return ()
    gpus = find_gpus()
    if not gpus:
        raise InputError(
            f"{version} runs on NVIDIA GPUs, and nvidia-smi shows none that CUDA_VISIBLE_DEVICES "
            f"allows: for CPUs, pip install 'elbowroom[cpu]'"
        )
    return gpus


def assumed_gpus(gpus: Sequence[Gpu], num_devices: int) -> Cluster:
    """GPUs of which nothing is known but their memory: good to compare layouts, not for times."""
    gpu = min(gpus, key=lambda gpu: gpu.free_bytes)
    device = assumed_device(
        gpu.name,
        gpu.memory_bytes,
        _FREE_FRACTION,
        _FLOPS,
        _BYTES_PER_SECOND,
        layer_seconds=1e-4,
        iteration_seconds=3e-3,
        row_seconds=5e-6,
        copies_overlap=True,
    )
    return on_gpus(Cluster("this-machine", 1, device, (), uncertainty=1.0), gpus, num_devices)


def on_gpus(cluster: Cluster, gpus: Sequence[Gpu], num_devices: int) -> Cluster:
    """``num_devices`` devices like the cluster's, on the GPUs that are there.

    Where they are more than there are GPUs, each is a part of one, and so is each of its rates.
    Only replicas on one GPU read each other's memory in place.
    """
    num_sharing = -(-num_devices // len(gpus))
    device, links = cluster.device, cluster.links[:1]
    if num_sharing > 1:
        device = device.with_rates(
            lambda rate: replace(rate, peak=rate.peak / num_sharing), num_sharing
        )
        device = replace(device, memory_bytes=device.memory_bytes // num_sharing)
        links = (Link("device memory", num_devices, device.memory_bandwidth, 0.0),)
    device = replace(device, maps_peers=len(gpus) == 1)
    links = tuple(replace(link, num_devices=num_devices) for link in links)
    return replace(
        cluster, num_devices=num_devices, device=device, links=links if num_devices > 1 else ()
    )


def free_bytes(gpus: Sequence[Gpu], num_devices: int) -> int:
    """What each of ``num_devices`` engines may use of the memory that is free now."""
    num_sharing = -(-num_devices // len(gpus))
    free = min(gpu.free_bytes for gpu in gpus)
    return max(0, int(free * _FREE_FRACTION) // num_sharing - GPU_ENGINE_BYTES)


def check_gpus(gpus: Sequence[Gpu], num_devices: int, memory_bytes: int) -> None:
    """Raise InputError for more memory than the GPUs have."""
    num_sharing = -(-num_devices // len(gpus))
    there = min(gpu.memory_bytes for gpu in gpus) // num_sharing
    asked = memory_bytes + GPU_ENGINE_BYTES
    if asked > there:
        raise InputError(
            f"--memory {format_bytes(memory_bytes)} needs {format_bytes(asked)} with the engine's "
            f"own, and {gpus[0].name} has {format_bytes(there)} for each of {num_sharing}: lower "
            f"--memory or --replicas"
        )
