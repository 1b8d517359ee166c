"""Claim: a pipeline that plans itself trains at least 1.3x as fast as its peers over a slow link.

    python -m bench.peers [--repeats 3] [--steps 30] [--models vgg_like gpt_like]

Two workers with a core each, in network namespaces joined by a link of 1 Gbit/s, and by one that is
not held back, where the bar is 1.0x (``bench.network``). All methods update once for each
minibatch, with the same optimizer. Peers: DistributedDataParallel, each worker half of a minibatch;
torch.distributed.pipelining, 1F1B, split by hand into halves of as many layers, with the best of 2,
4 and 8 microbatches. Shown beside, and no part of the claim: data parallel with an update for two
minibatches (the paper's way to count), and the other pipeline with our split. Methods alternate.

The floor is half of the compute of a minibatch, or the bytes over the link if those take longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import BUILD, write_result
from bench.models import digits, gpt_like, vgg_like
from bench.network import Host, run_workers, two_hosts
from elbowroom.core.pipedream_text import read_layer_graph
from elbowroom.core.pipeline_plan import Level, PipelineOptions, PipelinePlan
from elbowroom.planning.pipeline import plan_on_levels

MODELS = {"vgg_like": vgg_like, "gpt_like": gpt_like, "digits": digits}
GIGABIT = 1_000_000_000
MICROBATCHES = (2, 4, 8)


class Method(NamedTuple):
    """One of ``bench.peer_worker``; each of its minibatches are ``scale`` of the script."""

    kind: str
    flags: tuple[str, ...] = ()
    note: str = ""
    scale: int = 1
    is_peer: bool = False

    @property
    def name(self) -> str:
        return self.kind + self.note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    args = parser.parse_args()
    result = {name: compare(name, args.repeats, args.steps) for name in args.models}
    write_result("peers", result)


def compare(model: str, num_rounds: int, num_steps: int) -> dict[str, Any]:
    plan, path = plan_of(model)
    planned = plan.stages[1].layers[0]
    methods = methods_of(MODELS[model].HAND_MADE_CUT, planned, path)
    outcome: dict[str, Any] = {"cut": planned}
    for link, rate in (("1 Gbit/s", GIGABIT), ("not held back", None)):
        with two_hosts(rate) as hosts:
            rounds = [
                {one.name: train(hosts, model, one, num_steps) for one in methods}
                for _ in range(num_rounds)
            ]
        outcome[link] = {
            "floor_seconds": floor(plan, rate),
            "planned_seconds": plan.seconds,
            "rounds": rounds,
            **ratios(methods, rounds),
        }
        print(json.dumps({model: {link: outcome[link]}}, indent=2), flush=True)
    return outcome


def plan_of(model: str) -> tuple[PipelinePlan, Path]:
    """Two straight stages, for the slow link, from a profile taken now."""
    BUILD.mkdir(parents=True, exist_ok=True)
    profile, path = BUILD / f"{model}.json", BUILD / f"{model}.plan.json"
    measure = (sys.executable, "-m", "elbowroom.cli", "profile-model", str(MODELS[model].__file__))
    command = (*measure, "--out", str(profile), "--threads", "1", "--seconds", "5")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    options = PipelineOptions(sync="allreduce", straight=True)
    plan = plan_on_levels(read_layer_graph(profile), (Level(2, GIGABIT / 8),), options)
    path.write_text(json.dumps(plan.to_json()))
    return plan, path


def methods_of(hand_made: str, planned: str, plan: Path) -> list[Method]:
    def pipelining(cut: str, *, is_peer: bool) -> list[Method]:
        return [
            Method(
                "pipelining",
                ("--cut", cut, "--microbatches", str(count)),
                f" {cut} {count}",
                1,
                is_peer,
            )
            for count in MICROBATCHES
        ]

    return [
        Method("ours", ("--plan", str(plan))),
        Method("data-parallel", is_peer=True),
        Method("double-batch", scale=2),
        *pipelining(hand_made, is_peer=True),
        *pipelining(planned, is_peer=False),
    ]


def train(hosts: tuple[Host, Host], model: str, method: Method, num_steps: int) -> float:
    """Seconds per minibatch of the model's module."""
    command = ("bench.peer_worker", method.kind, model, "--steps", str(num_steps), *method.flags)
    seconds: float = run_workers(hosts, *command)["seconds"]
    return seconds / method.scale


def ratios(methods: list[Method], rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Of each method's seconds to ours, medians of rounds; and of the best peer."""
    of = {
        one.name: statistics.median(each[one.name] / each["ours"] for each in rounds)
        for one in methods
    }
    peers = [one.name for one in methods if one.is_peer]
    best = [min(each[name] for name in peers) / each["ours"] for each in rounds]
    return {"over_ours": of, "ours_over_best_peer": statistics.median(best), "by_round": best}


def floor(plan: PipelinePlan, bits_per_second: int | None) -> float:
    compute = sum(stage.seconds for stage in plan.stages) / len(plan.stages)
    moved = plan.stages[0].transfer_bytes / 2
    return max(compute, moved * 8 / bits_per_second) if bits_per_second else compute


if __name__ == "__main__":
    main()
