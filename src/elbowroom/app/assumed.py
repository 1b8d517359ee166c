"""Devices of which hardly anything is known: good to compare layouts, not for times."""

from __future__ import annotations

from elbowroom.core.cluster import Device, Rate


def assumed_device(
    name: str,
    memory_bytes: int,
    memory_fraction: float,
    flops: float,
    bytes_per_second: float,
    *,
    layer_seconds: float,
    iteration_seconds: float,
    row_seconds: float,
    copies_overlap: bool,
) -> Device:
    """A device that computes everything at one rate, and reads everything at another."""
    compute, memory = Rate(flops), Rate(bytes_per_second)
    return Device(
        name=name,
        memory_bytes=memory_bytes,
        memory_fraction=memory_fraction,
        flops=compute,
        flops_fp8=compute,
        memory_bandwidth=memory,
        attention_flops=compute,
        attention_bandwidth=memory,
        elementwise_bandwidth=memory,
        layer_seconds=layer_seconds,
        iteration_seconds=iteration_seconds,
        row_seconds=row_seconds,
        copies_overlap=copies_overlap,
        maps_peers=True,
    )
