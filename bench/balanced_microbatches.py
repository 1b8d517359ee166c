"""Claim: with microbatches of even padded cost, samples of unlike length train 1.3x as fast.

Over equal numbers of sorted samples, that is; over samples as they come, 2x as fast.

    python -m bench.balanced_microbatches [--repeats 7]

Two workers with a core each train a GPT of 4 blocks (``bench.models.unlike_lengths``) in a straight
pipeline, over gloo on the loopback device. A minibatch has 64 samples of lognormal lengths (sigma
0.8) in 8 microbatches, and the pipe empties for each update. Every round draws one minibatch and
trains it in each of the three ways, in turns, with the same processes; the first round is not
counted. The rate of learning is 0, so that all three must find the same loss.

The crossover of the costs comes from times of samples of a few lengths. The floor of a round is
what both workers computed with even costs, without padding (by the costs) and without waiting.
Beside each round stands the load of the machine, of which the workers are two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import elbowroom
from bench.common import BUILD, write_result
from bench.models import unlike_lengths as script
from bench.two_workers import LOCAL, run_workers
from elbowroom.planning.microbatches import Measured, Method, crossover_of, sample_cost
from elbowroom.planning.pipeline.plan import plan_on_levels
from elbowroom.plans.pipeline import Level, PipelineOptions

NUM_WORKERS, COUNT, BANDWIDTH = 2, 8, 1.25e9
SORTED: Method = "equal-numbers"
EVEN: Method = "even-cost"
COME: Method = "as-they-come"
METHODS = (COME, SORTED, EVEN)
MEASURED_LENGTHS, MEASURED_TOKENS, MEASURED_TIMES = (64, 128, 256, 512, 1024), 1024, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--plan", type=Path, help="for the workers, which print what they measured")
    parser.add_argument("--crossover", type=float)
    args = parser.parse_args()
    if args.plan:
        work(args.plan, args.crossover, args.repeats)
        return
    load = os.getloadavg()[0]
    crossover = measure_crossover()
    path = make_plan(crossover)
    words = ("--plan", str(path), "--crossover", str(crossover), "--repeats", str(args.repeats))
    rounds = run_workers((LOCAL, LOCAL), "bench.balanced_microbatches", *words)["rounds"]
    medians = {method: middle(rounds, method) for method in METHODS}
    write_result(
        "balanced_microbatches",
        {
            "load_before": load,
            "crossover": crossover,
            "stages": [stage["layers"] for stage in json.loads(path.read_text())["stages"]],
            "rounds": rounds,
            "median_seconds": medians,
            "floor_seconds": statistics.median(each["floor_seconds"] for each in rounds),
            "even_cost_over": {other: medians[other] / medians[EVEN] for other in (SORTED, COME)},
            "even_cost_over_in_rounds": {
                other: [each["seconds"][other] / each["seconds"][EVEN] for each in rounds]
                for other in (SORTED, COME)
            },
            "largest_difference_of_losses": max(each["difference_of_losses"] for each in rounds),
        },
    )


def middle(rounds: list[dict[str, Any]], method: Method) -> float:
    return statistics.median(each["seconds"][method] for each in rounds)


def measure_crossover() -> float:
    """From equally many tokens in rows of each length, on one core; medians of a few turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, taken = script.make_model(), {length: [] for length in MEASURED_LENGTHS}
    for turn in range(1 + MEASURED_TIMES):
        for length in MEASURED_LENGTHS:
            num_rows = MEASURED_TOKENS // length
            ids = torch.randint(script.VOCABULARY, (num_rows, length))
            begin = time.perf_counter()
            script.loss_fn(model(ids), ids).backward()
            if turn:
                taken[length].append((time.perf_counter() - begin) / num_rows)
    return crossover_of([Measured(n, statistics.median(seconds)) for n, seconds in taken.items()])


def make_plan(crossover: float) -> Path:
    """Two stages, from a profile of one microbatch of even cost."""
    BUILD.mkdir(parents=True, exist_ok=True)
    batch = script.make_batch(torch.Generator().manual_seed(0))
    inputs, targets, _ = script.cut(batch, COUNT, EVEN, crossover)[COUNT // 2]
    graph = elbowroom.profile(script.make_model(), (inputs, targets), script.loss_fn)
    options = PipelineOptions(straight=True)
    plan = plan_on_levels(graph, (Level(NUM_WORKERS, BANDWIDTH),), options)
    path = BUILD / "unlike_lengths.plan.json"
    path.write_text(json.dumps(plan.to_json()))
    return path


def work(plan: Path, crossover: float, num_rounds: int) -> None:
    """One of the two workers; the last one prints."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    pipeline = elbowroom.Pipeline(
        script.make_model(),
        elbowroom.read_pipeline_plan(plan),
        partial(torch.optim.SGD, lr=0.0),
        script.loss_fn,
        elbowroom.StageOptions("flush", COUNT),
    )
    generator = torch.Generator().manual_seed(0)
    rounds = [
        train_round(pipeline, script.make_batch(generator), crossover, number)
        for number in range(1 + num_rounds)
    ][1:]
    pipeline.close()
    if distributed.get_rank() == NUM_WORKERS - 1:
        print(json.dumps({"rounds": rounds}))
    distributed.barrier()
    distributed.destroy_process_group()


def train_round(
    pipeline: elbowroom.Pipeline, batch: script.Batch, crossover: float, number: int
) -> dict[str, Any]:
    """One minibatch in the three ways, each round beginning with another."""
    lengths = script.lengths_of(batch[1])
    seconds, losses, tokens = {}, {}, {}
    start = number % len(METHODS)
    for method in (*METHODS[start:], *METHODS[:start]):
        parts = script.cut(batch, COUNT, method, crossover)
        tokens[method] = sum(part.inputs.numel() for part in parts)
        busy = pipeline.busy_seconds
        distributed.barrier()
        begin = time.perf_counter()
        losses[method] = pipeline.train_step(parts) or 0.0
        distributed.barrier()
        seconds[method] = time.perf_counter() - begin
        if method == EVEN:
            computed = torch.tensor(pipeline.busy_seconds - busy)
            distributed.all_reduce(computed)
            padded = sum(len(p.inputs) * sample_cost(p.inputs.size(1), crossover) for p in parts)
            real = sum(sample_cost(length, crossover) for length in lengths)
            floor_seconds = float(computed) / NUM_WORKERS * real / padded
    return {
        "load": os.getloadavg()[0],
        "tokens": sum(lengths),
        "padded_tokens": tokens,
        "seconds": seconds,
        "floor_seconds": floor_seconds,
        "difference_of_losses": max(losses.values()) - min(losses.values()),
    }


if __name__ == "__main__":
    main()
