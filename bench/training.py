"""Claim: a pipeline takes the time, and idles as much, as was simulated before it ran.

    python -m bench.training [--repeats 3] [--steps 40]

Every round profiles the model of examples/train_demo_lm.py on one core while the other one does the
same, plans two straight stages, simulates that plan and trains by it, each worker on one core.
Compared are seconds per minibatch while the pipe is full, and each worker's idle share of the whole
run. The floor is the slowest stage's compute; gloo over the loopback device stands in for a link
(10 Gbit/s assumed).
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
from elbowroom.core.pace import steady_seconds
from elbowroom.core.pipedream_text import read_layer_graph
from elbowroom.core.pipeline_plan import Level, PipelineOptions, PipelinePlan
from elbowroom.planning.pipeline import plan_on_levels
from elbowroom.planning.schedule import plan_schedule
from elbowroom.planning.simulate_pipeline import simulate_plan

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
    rounds = [compare(args.steps) for _ in range(args.repeats)]
    ratios = [one["measured_over_simulated"] for one in rounds]
    write_result("training", {"rounds": rounds, "median": statistics.median(ratios)})


def compare(num_steps: int) -> dict[str, Any]:
    BUILD.mkdir(parents=True, exist_ok=True)
    profile, path = BUILD / "lm.json", BUILD / "lm.plan.json"
    measure = (sys.executable, "-m", "elbowroom.cli", "profile-model", str(SCRIPT))
    flags = ("--threads", "1", "--seconds", "5", "--workers", str(NUM_WORKERS))
    run(*measure, "--out", str(profile), *flags)
    graph = read_layer_graph(profile)
    plan = plan_on_levels(graph, (Level(NUM_WORKERS, BANDWIDTH),), PipelineOptions(straight=True))
    path.write_text(json.dumps(plan.to_json()))
    timeline = simulate_plan(plan, graph, plan_schedule((1,) * NUM_WORKERS, num_steps))
    simulated = Run(timeline.steady_seconds, timeline.bubbles)
    measured = train(path, num_steps)
    outcome = {
        "planned_seconds": plan.seconds,
        "floor_seconds": slowest_compute(plan),
        "simulated": simulated._asdict(),
        "measured": measured._asdict(),
        "measured_over_simulated": measured.seconds / simulated.seconds,
    }
    print(json.dumps(outcome), flush=True)
    return outcome


def slowest_compute(plan: PipelinePlan) -> float:
    return max(stage.seconds for stage in plan.stages)


def train(plan: Path, num_steps: int) -> Run:
    """By torchrun, and what its trace shows."""
    trace = BUILD / "lm.trace.json"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
    worker = (str(NUM_WORKERS), "-m", "elbowroom.pipeline", str(SCRIPT), "--plan", str(plan))
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
