"""Claim: planning takes seconds: 2 for 8 devices, 30 for 1,024; a job of 100,000 rows under 60.

Pipelines on 64 workers: 1 for a chain of 500 layers, 10 for the largest of the PipeDream authors'
profiles, which is left out (null) where ``../shared/profiles`` is absent.

python -m bench.planning_time [--repeats 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from bench.common import ROOT, write_result
from elbowroom.core.cluster import Cluster, Link, Rate
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.layer_graph import Edge, Layer, LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.core.model import read_model
from elbowroom.core.workload import parse_lengths
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pool import modes
from elbowroom.planning.pool.job import ReplicaLimits, simulate_job
from elbowroom.planning.pool.layouts import EngineLimits, policy_of, pool_times
from elbowroom.planning.pool.search import choose
from elbowroom.plans.pipeline import Level
from elbowroom.plans.pool import Layout

NUM_ROWS = 100_000
WORKERS = (Level(64, 1.25e9, "10 Gbit/s"),)
LARGEST = ROOT.parent / "shared" / "profiles" / "pipedream" / "nasnetalarge.graph.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = read_model(ROOT / "tests" / "data" / "models" / "Llama-3.1-70B")
    h200 = read_cluster("h200-8")
    job = parse_lengths(f"512-4096:64-1024x{NUM_ROWS}").longest_first()
    layout = Layout(1, 8, 1, "shipped", 7)

    def search(cluster: Cluster) -> None:
        modes._link_share.cache_clear()
        choose(model, cluster, job, EngineLimits(1024))

    def simulate() -> None:
        times = pool_times(model, h200, layout)
        simulate_job(times, ReplicaLimits(220_000), job, 8, policy_of(layout))

    result = {
        "search_seconds_8_devices": seconds(lambda: search(h200), args.repeats),
        "search_seconds_1024_devices": seconds(lambda: search(larger(h200, 1024)), args.repeats),
        "simulate_seconds_100000_rows": seconds(simulate, args.repeats),
        "pipeline_seconds_500_layers": pipeline_seconds(long_chain(500), args.repeats),
        "pipeline_seconds_largest_graph": (
            pipeline_seconds(read_layer_graph(LARGEST), args.repeats) if LARGEST.exists() else None
        ),
    }
    write_result("planning_time", result)


def larger(cluster: Cluster, num_devices: int) -> Cluster:
    far = Link("network", num_devices, Rate(50e9, 0.8), 1.5e-5, network=True)
    return replace(cluster, num_devices=num_devices, links=(*cluster.links, far))


def long_chain(num_layers: int) -> LayerGraph:
    """Layers of any time and size, after each other."""
    draw = random.Random(0)
    layers = tuple(
        Layer(
            name=f"layer{index}",
            forward_seconds=draw.uniform(0, 0.01),
            backward_seconds=draw.uniform(0, 0.02),
            activation_bytes=draw.randrange(10**6, 10**8),
            parameter_bytes=draw.randrange(10**5, 10**7),
        )
        for index in range(num_layers)
    )
    names = [layer.name for layer in layers]
    return LayerGraph(layers, tuple(Edge(*pair) for pair in pairwise(names)))


def pipeline_seconds(graph: LayerGraph, repeats: int) -> float:
    return seconds(lambda: plan_on_levels(graph, WORKERS), repeats)


def seconds(work: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
