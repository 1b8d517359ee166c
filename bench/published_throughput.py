"""Claim: plans are within 0.7-1.3x of throughput that others measured and published.

Rows of 1,000 prompt and 1,000 output tokens on models quantised to 8 bits (gpt-oss: 4), as
NVIDIA publishes them for TensorRT-LLM. Each figure is planned in the layout and with the KV cache
of the measurement; nothing is fitted to it. Runs without any device.

python -m bench.published_throughput
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.common import ROOT, write_result
from elbowroom.app.architecture import built_tensors
from elbowroom.core.cluster_file import read_cluster
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.core.workload import parse_lengths
from elbowroom.planning.pool.layouts import EngineLimits
from elbowroom.planning.pool.search import evaluate
from elbowroom.plans.pool import Layout

CONFIGS = ROOT / "tests" / "data" / "configs"
FP8 = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
OVERVIEW = "NVIDIA/TensorRT-LLM docs/source/developer-guide/perf-overview.md at 03e27c7"
OLDER = "NVIDIA/TensorRT-LLM docs/source/performance/perf-overview.md at 00f3768"
ROWS = "1000:1000x{}"
ROWS_PER_REPLICA = 3000


@dataclass(frozen=True)
class Figure:
    """Output tokens per second and device, as published, and the layout that gave them."""

    model: str
    cluster: str
    layout: Layout
    tokens_per_second: float
    source: str
    kv_dtype: str | None = "fp8"


def tensor_parallel(devices: int) -> Layout:
    return Layout(devices, 1, 1, "none")


def experts_divided(devices: int) -> Layout:
    """Attention for the rows of each device, experts among all: "DEP" in the source."""
    return Layout(1, devices, 1, "none", expert_parallel=True)


FIGURES = (
    Figure("llama-3.1-8b-fp8", "h100-1", tensor_parallel(1), 15_220, OLDER),
    Figure("llama-3.1-8b-fp8", "h200-1", tensor_parallel(1), 17_744, OLDER),
    Figure("llama-3.1-70b-fp8", "h100-2", tensor_parallel(2), 2209, OVERVIEW),
    Figure("llama-3.1-70b-fp8", "h200-2", tensor_parallel(2), 2587, OVERVIEW),
    Figure("llama-3.1-70b-fp8", "h200-1", tensor_parallel(1), 2909, OLDER),
    Figure("llama-3.1-405b-fp8", "h100-8", tensor_parallel(8), 2919 / 8, OLDER),
    Figure("llama-3.1-405b-fp8", "h200-8", tensor_parallel(8), 3330 / 8, OLDER),
    Figure("qwen3-235b-a22b-fp8", "h100-8", experts_divided(8), 1932, OVERVIEW, None),
    Figure("qwen3-235b-a22b-fp8", "h200-4", experts_divided(4), 3288, OVERVIEW, None),
    Figure("deepseek-v3", "h200-8", experts_divided(8), 1627, OVERVIEW),
    Figure("gpt-oss-120b", "h200-1", tensor_parallel(1), 6868, OVERVIEW, None),
    Figure("gpt-oss-120b", "h100-4", experts_divided(4), 4685, OVERVIEW, None),
    Figure("gpt-oss-20b", "h200-1", tensor_parallel(1), 13_858, OVERVIEW, None),
    Figure("gpt-oss-20b", "h100-1", tensor_parallel(1), 11_557, OVERVIEW, None),
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for figure in FIGURES:
        planned = planned_throughput(figure)
        rows.append(
            {
                "model": figure.model,
                "cluster": figure.cluster,
                "layout": str(figure.layout),
                "published": round(figure.tokens_per_second),
                "planned": round(planned),
                "planned_over_published": planned / figure.tokens_per_second,
                "source": figure.source,
            }
        )
        print(f"{figure.model:20} {figure.cluster:7} {figure.layout!s:24}", end=" ")
        print(f"{rows[-1]['published']:>7} {rows[-1]['planned']:>7}", end=" ")
        print(f"{rows[-1]['planned_over_published']:.2f}x")
    ratios = [float(row["planned_over_published"]) for row in rows]
    within = sum(0.7 <= ratio <= 1.3 for ratio in ratios)
    print(f"{within} of {len(rows)} within 0.7-1.3x, median {statistics.median(ratios):.2f}x")
    write_result("published_throughput", {"figures": rows, "within_goal": within})


def planned_throughput(figure: Figure) -> float:
    """Output tokens per second and device that a plan promises in the figure's layout."""
    model = replace(facts(figure.model), kv_dtype=figure.kv_dtype)
    job = parse_lengths(ROWS.format(ROWS_PER_REPLICA * figure.layout.num_replicas))
    found = evaluate(model, read_cluster(figure.cluster), job, EngineLimits(), figure.layout)
    return found.tokens_per_second / figure.layout.num_devices


def facts(name: str) -> ModelFacts:
    """Facts of a model from its config, which tests compare with what is known of it."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "config.json"
        if name == "llama-3.1-8b-fp8":
            own = ROOT / "tests" / "data" / "models" / "Llama-3.1-8B" / "config.json"
            config = {**json.loads(own.read_text()), "quantization_config": FP8}
            target.write_text(json.dumps(config))
        else:
            shutil.copy(CONFIGS / f"{name}.json", target)
        return read_model(Path(folder), build=built_tensors)


if __name__ == "__main__":
    main()
