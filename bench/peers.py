"""Claim: a pipeline that plans itself trains at least 1.3x as fast as its peers over a slow link.

    python -m bench.peers [--repeats 3] [--steps 30] [--models vgg_like gpt_like]

Two workers with a core each, in network namespaces joined by a link of 1 Gbit/s, and by one that is
not held back, where the bar is 1.0x (``bench.two_workers``). All methods update once for each
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
from typing import Any, NamedTuple

from bench.common import write_result
from bench.models import gpt_like, vgg_like
from bench.two_workers import Host, plan_two_stages, run_workers, two_hosts
from elbowroom.plans.pipeline import PipelinePlan

MODELS = {"vgg_like": vgg_like, "gpt_like": gpt_like}
GIGABIT = 1_000_000_000
MICROBATCHES = ("2", "4", "8")
PEERS = ("data parallel", "pipelining, split by hand")

Seconds = dict[str, float]
"""Seconds of a minibatch, by the name of a method."""


class Method(NamedTuple):
    """A command line of ``bench.peer_worker``."""

    name: str
    command: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="even")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    args = parser.parse_args()
    write_result("peers", {name: compare(name, args.repeats, args.steps) for name in args.models})


def compare(model: str, num_rounds: int, num_steps: int) -> dict[str, Any]:
    plan, path = plan_two_stages(MODELS[model], GIGABIT / 8)
    cut = plan.stages[1].layers[0]
    methods = [
        Method("ours", ("ours", "--plan", str(path))),
        Method("data parallel", ("data-parallel",)),
        Method("data parallel, double batch", ("double-batch",)),
        *pipelines("pipelining, split by hand", MODELS[model].HAND_MADE_CUT),
        *pipelines("pipelining, split as ours", cut),
    ]
    outcome: dict[str, Any] = {"cut": cut}
    for link, rate in (("1 Gbit/s", GIGABIT), ("not held back", None)):
        with two_hosts(rate) as hosts:
            rounds = train_all(hosts, model, methods, num_rounds, num_steps)
        best = [min(each[name] for name in PEERS) / each["ours"] for each in rounds]
        outcome[link] = {
            "floor_seconds": floor(plan, rate),
            "planned_seconds": plan.seconds,
            "rounds": rounds,
            "over_best_peer": {"rounds": best, "median": statistics.median(best)},
        }
        print(json.dumps({model: {link: outcome[link]}}, indent=2), flush=True)
    return outcome


def pipelines(name: str, cut: str) -> list[Method]:
    return [
        Method(name, ("pipelining", "--cut", cut, "--microbatches", count))
        for count in MICROBATCHES
    ]


def train_all(
    hosts: tuple[Host, Host], model: str, methods: list[Method], num_rounds: int, num_steps: int
) -> list[Seconds]:
    """Rounds of all methods. Of those that share a name the first round finds the best."""
    first = {method: train(hosts, model, method, num_steps) for method in methods}
    best: dict[str, Method] = {}
    for method in sorted(methods, key=first.__getitem__, reverse=True):
        best[method.name] = method
    rounds = [{name: first[method] for name, method in best.items()}]
    for _ in range(num_rounds - 1):
        rounds.append({n: train(hosts, model, method, num_steps) for n, method in best.items()})
    return rounds


def train(hosts: tuple[Host, Host], model: str, method: Method, num_steps: int) -> float:
    """Seconds per minibatch of the model's module."""
    kind, *flags = method.command
    command = ("bench.peer_worker", kind, model, "--steps", str(num_steps), *flags)
    seconds: float = run_workers(hosts, *command)["seconds"]
    return seconds


def floor(plan: PipelinePlan, bits_per_second: int | None) -> float:
    compute = sum(stage.seconds for stage in plan.stages) / len(plan.stages)
    moved = plan.stages[0].transfer_bytes / 2
    return max(compute, moved * 8 / bits_per_second) if bits_per_second else compute


if __name__ == "__main__":
    main()
