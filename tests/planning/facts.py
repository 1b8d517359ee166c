"""Models, clusters and jobs that tests of the planner share."""

from __future__ import annotations

from pathlib import Path

from elbowroom.core.cluster import Cluster, Device, Link, MatmulPoint, Rate
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.model import ModelFacts, read_model

MODELS = Path(__file__).parents[1] / "data" / "models"
CONFIGS = MODELS.parent / "configs"
"""Configs of public models, one file each."""

H20, H200 = read_cluster("h20-8"), read_cluster("h200-8")

CPU = Cluster(
    name="this-machine",
    num_devices=2,
    device=Device(
        name="one core",
        memory_bytes=8 * 10**9,
        memory_fraction=0.8,
        flops=Rate(200e9),
        flops_fp8=Rate(200e9),
        memory_bandwidth=Rate(14e9),
        attention_flops=Rate(40e9),
        attention_bandwidth=Rate(10e9),
        elementwise_bandwidth=Rate(4e9),
        layer_seconds=2e-4,
        iteration_seconds=4e-3,
        row_seconds=1e-4,
        copies_overlap=False,
        maps_peers=True,
        matmul=(MatmulPoint(1, 7e9), MatmulPoint(16, 5e9), MatmulPoint(256, 0.39e9)),
    ),
    links=(Link("shared memory", 2, Rate(8e9), 0.0),),
    uncertainty=0.15,
    sources={"all": 'rounded from "a" machine'},
)
"""Two cores as ``profile`` describes them."""


def model(name: str) -> ModelFacts:
    return read_model(MODELS / name)
