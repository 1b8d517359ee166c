"""Claim: a pipeline takes the time, and idles as much, as was simulated before it ran.

    python -m bench.training [--repeats 3] [--steps 40]

Every round trains the model of examples/train_demo_lm.py by a plan of two straight stages, each
worker on one core. The layers are profiled before and after it, on one core while the other one
does the same, as the machine may change its speed meanwhile: simulated is the mean of both, and
``drift`` is what the second says over the first. Compared are seconds per minibatch while the pipe
is full, and each worker's idle share of the whole run. The floor is the slowest stage's compute;
gloo over the loopback device stands in for a link (10 Gbit/s assumed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import BUILD, write_result
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import simulate_pipeline_plan
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan
from elbowroom.plans.pipeline_pace import steady_seconds

SCRIPT = Path(__file__).parents[1] / "examples" / "train_demo_lm.py"
NUM_WORKERS, BANDWIDTH = 2, 1.25e9


class Run(NamedTuple):
    """Seconds per minibatch while the pipe is full; of the whole run, each worker's idle share."""

    seconds: float
    bubbles: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    before = profile()
    rounds = []
    for _ in range(args.repeats):
        plan = plan_on_levels(
            before, (Level(NUM_WORKERS, BANDWIDTH),), PipelineOptions(straight=True)
        )
        measured = train(plan, args.steps)
        after = profile()
        simulated = [simulate(plan, graph, args.steps) for graph in (before, after)]
        rounds.append(compare(plan, simulated, measured))
        before = after
    ratios = [one["measured_over_simulated"] for one in rounds]
    write_result("training", {"rounds": rounds, "median": statistics.median(ratios)})


def profile() -> LayerGraph:
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "lm.json"
    measure = (sys.executable, "-m", "elbowroom", "train", "profile", str(SCRIPT))
    flags = ("--threads", "1", "--seconds", "5", "--workers", str(NUM_WORKERS))
    run(*measure, "--out", str(path), *flags)
    return read_layer_graph(path)


def simulate(plan: PipelinePlan, graph: LayerGraph, num_steps: int) -> Run:
    timeline = simulate_pipeline_plan(plan, graph, plan_schedule((1,) * NUM_WORKERS, num_steps))
    return Run(timeline.steady_seconds, timeline.bubbles)


def compare(plan: PipelinePlan, simulated: list[Run], measured: Run) -> dict[str, Any]:
    seconds = statistics.mean(one.seconds for one in simulated)
    bubbles = zip(*(one.bubbles for one in simulated), strict=True)
    outcome = {
        "floor_seconds": max(stage.seconds for stage in plan.stages),
        "simulated": {"seconds": seconds, "bubbles": [statistics.mean(each) for each in bubbles]},
        "drift": simulated[-1].seconds / simulated[0].seconds,
        "measured": measured._asdict(),
        "measured_over_simulated": measured.seconds / seconds,
    }
    print(json.dumps(outcome), flush=True)
    return outcome


def train(plan: PipelinePlan, num_steps: int) -> Run:
    """By torchrun, and what its trace shows."""
    path, trace = BUILD / "lm.plan.json", BUILD / "lm.trace.json"
    path.write_text(json.dumps(plan.to_json()))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
    worker = (str(NUM_WORKERS), "-m", "elbowroom.pipeline", str(SCRIPT), "--plan", str(path))
    run(*torchrun, *worker, "--steps", str(num_steps), "--trace", str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    workers = sorted({span["pid"] for span in spans})
    begin = min(span["ts"] for span in spans)
    end = max(span["ts"] + span["dur"] for span in spans)
    busy = [sum(s["dur"] for s in spans if s["pid"] == pid) for pid in workers]
    updates = [
        (span["ts"] + span["dur"]) / 1e6
        for span in spans
        if span["pid"] == workers[0] and span["name"].startswith("update")
    ]
    seconds = steady_seconds(list(enumerate(updates[:-NUM_WORKERS])))
    assert seconds is not None, "give more steps"
    return Run(seconds, tuple(1 - own / (end - begin) for own in busy))


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
