"""Claim: the planner finds PipeDream's plans, and the simulator says what they leave out.

    python -m bench.pipedream_reproduction

Prints the tables of ``docs/pipedream-reproduction.md`` and keeps the numbers in ``bench/results``.
Nothing is measured: the PipeDream authors' profiles are read in ``../shared/profiles/pipedream``.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import Any, NamedTuple

from tests.planning.pipeline.pipelines import PROFILES

from bench.common import write_result
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.planning.pipeline.action_cost import PipelineCosts, StageCosts, plan_costs
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pipeline.prediction import alternatives, fastest, predict, with_prediction
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import simulate_pipeline
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan, Sync

DEPTHS = (1, 2, 3)
NO_LIMIT = (Level(64, 1e30),)


class Case(NamedTuple):
    profile: str
    num_workers: int
    gbits: float = 10.0
    sync: Sync = "ps"


PAPERS = (
    *(Case(name, n) for name in ("vgg16", "alexnet", "resnet50") for n in (4, 8, 16)),
    *(Case(name, n) for name in ("gnmt", "gnmt_large") for n in (4, 8)),
)
REPLICATED = (
    Case("gnmt", 16),
    Case("gnmt_large", 8, 25.0, "allreduce"),
    Case("gnmt_large", 16, 25.0, "allreduce"),
    Case("alexnet", 16, 25.0),
    Case("nasnetalarge", 8),
)
INNER = ((1, 2, 1), (1, 3, 1), (1, 1, 2, 1), (1, 9, 6), (3, 1, 1), (2, 2, 2))


def main() -> None:
    result = {
        "papers": [row(case) for case in PAPERS],
        "replicated": [{**row(case), "parts": parts(case)} for case in REPLICATED],
        "inner_replicas": {"-".join(map(str, shape)): inner(shape) for shape in INNER},
        "vgg16_batch_32_traffic_saved": traffic_saved(),
    }
    write_result("pipedream_reproduction", result)


def planned(case: Case) -> tuple[LayerGraph, PipelinePlan]:
    graph = read_layer_graph(PROFILES / f"{case.profile}.graph.txt")
    levels = (Level(case.num_workers, case.gbits * 1.25e8),)
    return graph, plan_on_levels(graph, levels, PipelineOptions(sync=case.sync))


def row(case: Case) -> dict[str, Any]:
    """The formula's best plan, what it takes at each depth, and the fastest of all candidates."""
    graph, plan = planned(case)
    at_depths = [at_depth(plan, graph, depth) for depth in DEPTHS]
    candidates = (with_prediction(one, predict(one, graph)) for one in alternatives(plan, graph))
    best = fastest(tuple(candidates))
    shown = {
        **case._asdict(),
        "plan": str(plan),
        "planned_seconds": plan.seconds,
        "simulated_over_planned": [simulated / plan.seconds for simulated in at_depths],
        "fastest": f"{best}, depth {best.options.depth}",
        "fastest_simulated_seconds": best.simulated_seconds,
    }
    print(shown, flush=True)
    return shown


def at_depth(plan: PipelinePlan, graph: LayerGraph, depth: int) -> float:
    """Seconds of the plan's own stages with more in flight."""
    options = replace(plan.options, depth=depth)
    prediction = predict(plan_on_levels(graph, plan.levels, options), graph)
    assert prediction is not None, "more than a second to simulate"
    return prediction.seconds


def parts(case: Case) -> dict[str, list[float]]:
    """Over the planned seconds, at depths 1 and 2: of computing alone, and with what is moved."""
    graph, plan = planned(case)
    costs, count = plan_costs(plan, graph), 12 * plan.num_workers
    replicas = plan.replicas
    without = {
        "compute": {"crossing_bytes": 0, "parameter_bytes": 0},
        "and transfers": {"parameter_bytes": 0},
        "and sync": {"crossing_bytes": 0},
    }
    return {
        name: [
            simulate_pipeline(
                plan_schedule(replicas, count, depth=depth),
                replace(costs, stages=tuple(replace(one, **left_out) for one in costs.stages)),
            ).steady_seconds
            / plan.seconds
            for depth in (1, 2)
        ]
        for name, left_out in without.items()
    }


def inner(replicas: tuple[int, ...]) -> list[float]:
    """Seconds at each depth, where all workers compute 1 s a minibatch and nothing else does."""
    costs = PipelineCosts(tuple(StageCosts(r / 3, r * 2 / 3) for r in replicas), NO_LIMIT)
    whole = lcm(*replicas)
    num_minibatches = -(-24 * sum(replicas) // whole) * whole
    schedules = (plan_schedule(replicas, num_minibatches, depth=depth) for depth in DEPTHS)
    return [simulate_pipeline(schedule, costs).steady_seconds for schedule in schedules]


def traffic_saved() -> float:
    """Plan 15-1 on 16 workers; the profile has 128 rows."""
    vgg16 = read_layer_graph(PROFILES / "vgg16.graph.txt").for_batch(32 / 128)
    return plan_on_levels(vgg16, (Level(16, 1.25e9),)).traffic[0].saved


if __name__ == "__main__":
    main()
