"""Claim: over a slow link a planned grid trains at least twice as fast as DistributedDataParallel.

    python -m bench.grid_peers [--rounds 3] [--steps 3]

Four workers in network namespaces on a bridge, on two cores: an emulated network on one machine.
It is held to 200 Mbit/s each way of each worker, or not at all; the bar there is 0.95x. The model
is two convolutions and three linear layers, which have nearly all weights. Measured first, on one
worker while all four do the same: the link, and the seconds of each layer (the means of sweeps).
From these the planner predicts every grid: what it chooses for each of its forms, a split of the
batch, the choice with one layer changed, and random ones, from bad to good by what is predicted.
Then all of them, DistributedDataParallel and torch's tensor parallel (linear layers; convolutions
in DistributedDataParallel) train in turns with the same batches, for rounds, after one that is
dropped. Held to a rank correlation of predicted with measured of 0.8, and the planner's choice to
1.3x of the best grid that was measured. All methods must come to the same loss.

The floor is the bytes of the busiest worker over the link, or all products over all cores if those
take longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.common import BUILD, write_result
from bench.grid_worker import FORMS
from bench.models import fc_heavy
from bench.two_workers import Host, bridged_hosts, run_workers
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.planning.grid.blocks import block_graph
from elbowroom.planning.grid.plan import explain_grid, plan_grid
from elbowroom.planning.grid.settings import Forms, GridLink, GridSettings
from elbowroom.planning.grid.strategies import strategies_of
from elbowroom.plans.grid import GridPlan, LayerGrid

PROCS, BATCH = 4, fc_heavy.ROWS
RATE = 200_000_000
FORMS_OF_PLANS: tuple[Forms, ...] = ("paper", "linear", "all")
CHOICE = "planned, all"
NUM_CHANGED, NUM_RANDOM, NUM_DRAWN = 8, 16, 320
BUCKETS_MB = (25, 1)
FREE_ROUNDS = 3
"""Times as many rounds where the link is free: there are few cases, and cores decide."""
TIMEOUT = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a case in a round")
    args = parser.parse_args()
    result: dict[str, Any] = {"network": "emulated: namespaces of one machine"}
    for name, rate in (("200 Mbit/s", RATE), ("not held back", None)):
        with bridged_hosts(PROCS, rate) as hosts:
            num_rounds = args.rounds if rate else FREE_ROUNDS * args.rounds
            result[name] = compare(hosts, rate, num_rounds, args.steps)
        print(json.dumps({name: result[name]}, indent=2), flush=True)
    write_result("grid_peers", result)


@dataclass(frozen=True)
class Facts:
    """What was measured before: shapes with seconds, the link, a worker's rate of products."""

    shapes: ModelShapes
    link: GridLink
    flops_per_second: float

    @staticmethod
    def measured(hosts: Sequence[Host]) -> Facts:
        said = run_workers(hosts, "bench.grid_worker", "fc_heavy", timeout=TIMEOUT)
        link = GridLink(said["latency_seconds"], said["bandwidth"])
        return Facts(ModelShapes.from_json(said["shapes"]), link, said["flops_per_second"])

    def seconds(self, plan: GridPlan) -> float:
        settings = GridSettings(plan.procs, plan.batch, self.link)
        return explain_grid(self.shapes, plan, settings).seconds

    def floor(self, busiest_bytes: float, rate: int | None) -> float:
        """Seconds that a step takes at least."""
        forward = sum(layer.flops for layer in self.shapes.layers)
        flops = 3 * forward - self.shapes.weighted[0].flops  # nothing reads the input's gradient
        bandwidth = rate / 8 if rate else self.link.bandwidth
        cores = min(os.cpu_count() or 1, PROCS)
        return max(busiest_bytes / bandwidth, flops / (self.flops_per_second * cores))


def compare(
    hosts: Sequence[Host], rate: int | None, num_rounds: int, num_steps: int
) -> dict[str, Any]:
    facts = Facts.measured(hosts)
    plans = planned(facts)
    if rate is not None:
        plans |= others(facts, plans[CHOICE])
    cases = [{"name": name, "plan": plan.to_json()} for name, plan in plans.items()]
    cases += [
        {
            "name": f"data parallel, buckets of {size} MB",
            "method": "data parallel",
            "bucket_mb": size,
        }
        for size in BUCKETS_MB
    ]
    cases += [{"name": f"tensor parallel, {form}", "method": "", "form": form} for form in FORMS]
    path = BUILD / "grid_cases.json"
    path.write_text(json.dumps(cases))
    counts = ("--rounds", str(num_rounds), "--steps", str(num_steps))
    command = ("bench.grid_worker", "fc_heavy", "--cases", str(path), *counts)
    found = run_workers(hosts, *command, timeout=TIMEOUT)["cases"]
    check_losses(found)
    measured = {case["name"]: case for case in found}
    grids = [
        {
            "layers": [f"{layer.name} {layer}" for layer in plan.layers],
            "predicted": facts.seconds(plan),
            **measured[name],
        }
        for name, plan in plans.items()
    ]
    said = {
        "latency_seconds": facts.link.latency_seconds,
        "bandwidth": facts.link.bandwidth,
        "flops_per_second": facts.flops_per_second,
        "profiled_seconds": profiled(facts.shapes),
        "floor_seconds": facts.floor(measured[CHOICE]["busiest"], rate),
        "load": os.getloadavg(),
        "data_parallel_over_choice": over_choice(measured, "data parallel"),
        "tensor_parallel_over_choice": over_choice(measured, "tensor parallel"),
    }
    if rate is not None:
        said |= held(grids)
    return {**said, "grids": grids, "peers": found[len(plans) :]}


def planned(facts: Facts) -> dict[str, GridPlan]:
    """A split of the batch, and what the planner chooses; ``linear`` where that is not ``all``."""
    layers = tuple(
        LayerGrid(layer.name, PROCS, (1,) * len(layer.space)) for layer in facts.shapes.weighted
    )
    plans = {"batch": GridPlan(PROCS, BATCH, layers)}
    for forms in FORMS_OF_PLANS:
        plan = plan_grid(facts.shapes, PROCS, BATCH, facts.link, forms=forms).plan
        plans[f"planned, {forms}"] = plan
    if plans["planned, linear"].layers == plans[CHOICE].layers:
        del plans["planned, linear"]
    return plans


def others(facts: Facts, choice: GridPlan) -> dict[str, GridPlan]:
    """The choice with one layer changed, and random plans, evenly over what is predicted."""
    draw = random.Random(0)
    changed: dict[tuple[LayerGrid, ...], GridPlan] = {}
    while len(changed) < NUM_CHANGED:
        one = draw.choice(drawn(facts.shapes, draw).layers)
        layers = tuple(one if grid.name == one.name else grid for grid in choice.layers)
        if layers != choice.layers:
            changed[layers] = replace(choice, layers=layers)
    plans = {f"changed {k}": plan for k, plan in enumerate(changed.values(), start=1)}
    found = {plan.layers: plan for plan in (drawn(facts.shapes, draw) for _ in range(NUM_DRAWN))}
    ranked = sorted(found.values(), key=facts.seconds)
    step = (len(ranked) - 1) / (NUM_RANDOM - 1)
    picked = [ranked[round(k * step)] for k in range(NUM_RANDOM)]
    return plans | {f"random {k}": plan for k, plan in enumerate(picked, start=1)}


def drawn(shapes: ModelShapes, draw: random.Random) -> GridPlan:
    """A random grid for each layer with weights, all workers used."""
    layers = []
    for block in block_graph(shapes).blocks:
        if block.kind == "weighted":
            ways = strategies_of(block, PROCS, BATCH, "all")
            layers.append(ways.grid(draw.randrange(ways.count), block.name, has_inputs=True))
    return GridPlan(PROCS, BATCH, tuple(layers))


def check_losses(cases: Iterable[dict[str, Any]]) -> None:
    """Raise SystemExit where methods did not learn the same."""
    losses = {case["name"]: case["loss"] for case in cases}
    expected = statistics.median(losses.values())
    if wrong := {n: x for n, x in losses.items() if not math.isclose(x, expected, rel_tol=1e-5)}:
        raise SystemExit(f"the others' loss is {expected}, and these have {wrong}")


def profiled(shapes: ModelShapes) -> float:
    """Forward and backward of the whole batch on one worker."""
    return sum(layer.forward_seconds + layer.backward_seconds for layer in shapes.layers)


def over_choice(measured: dict[str, dict[str, Any]], method: str) -> dict[str, Any]:
    """Seconds of the best peer of a method in each round, over those of the planner's choice."""
    peers = [case["rounds"] for name, case in measured.items() if name.startswith(method)]
    best = min(peers, key=statistics.median)
    ratios = [one / ours for one, ours in zip(best, measured[CHOICE]["rounds"], strict=True)]
    return {"rounds": ratios, "median": statistics.median(ratios)}


def held(grids: list[dict[str, Any]]) -> dict[str, Any]:
    """What the planner's predictions are held to."""
    seconds = {grid["name"]: statistics.median(grid["rounds"]) for grid in grids}
    predicted = [grid["predicted"] for grid in grids]
    return {
        "rank_correlation": rank_correlation(predicted, [*seconds.values()]),
        "choice_over_best": seconds[CHOICE] / min(seconds.values()),
    }


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; equal numbers share the mean of their ranks."""
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


if __name__ == "__main__":
    main()
