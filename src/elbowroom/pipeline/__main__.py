"""Train the model of a script by a plan; torchrun starts a process for every worker.

torchrun --nproc-per-node 2 -m elbowroom.pipeline SCRIPT --plan plan.json --steps 200
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice

import torch
from torch import distributed

from elbowroom.core.errors import InputError
from elbowroom.core.trace import write_trace
from elbowroom.pipeline.flags import add_pipeline_flags
from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.pipeline import Pipeline, SchedulerFunction
from elbowroom.pipeline.progress import Progress, spans_of_all, summary
from elbowroom.plans.pipeline import PipelinePlan, read_pipeline_plan
from elbowroom.plans.pipeline_shape import Pipe
from elbowroom.swap.link import Link
from elbowroom.swap.minibatches import SwappedMinibatches
from elbowroom.swap.tier import FileTier
from elbowroom.training.loop import dtype_of
from elbowroom.training.microbatch import Minibatch
from elbowroom.training.script import TrainingScript, load_script
from elbowroom.training.worker import check_outputs, join, worker_main, worker_parser

_CHECKED = 3
"""Minibatches that are checked before the first update."""


def main() -> int:
    return worker_main(build_parser(), _train)


def build_parser() -> argparse.ArgumentParser:
    return worker_parser("elbowroom.pipeline", __doc__, add_pipeline_flags)


def _train(args: argparse.Namespace) -> None:
    check_outputs(args)
    script, plan = load_script(args.script), read_pipeline_plan(args.plan)
    join(args)
    pipeline = _make_pipeline(script, plan, args)
    first = pipeline.restore(args.checkpoints) if args.checkpoints else 0
    if first >= args.steps:
        raise InputError(f"{args.checkpoints} has learned from {first} already: raise --steps")
    progress = Progress(pipeline)
    begin = time.perf_counter()
    _run_steps(pipeline, script, args, first, progress)
    pipeline.close()
    progress.end()
    lines = summary(pipeline, progress, time.perf_counter() - begin, args.steps - first)
    spans = spans_of_all(pipeline) if args.trace else []
    if pipeline.worker == 0:
        print("\n".join(lines), flush=True)
        if args.trace:
            write_trace(args.trace, spans)
    distributed.destroy_process_group()


def _make_pipeline(
    script: TrainingScript, plan: PipelinePlan, args: argparse.Namespace
) -> Pipeline:
    stage = plan.stages[Pipe(plan.replicas).stages[distributed.get_rank()]]
    keeper = SwappedMinibatches(Link(FileTier(args.tier))) if stage.swapped_bytes else None
    return Pipeline(
        script.make_model(args.seed),
        plan,
        script.optimizer_fn(args.lr),
        script.loss_fn,
        StageOptions(
            args.semantics,
            args.microbatches,
            args.seed,
            autocast=dtype_of(args.autocast),
            keeps_record=args.trace is not None,
            clip_norm=args.clip_norm,
        ),
        _scheduler_fn(script, args, plan),
        keeper,
    )


def _run_steps(
    pipeline: Pipeline,
    script: TrainingScript,
    args: argparse.Namespace,
    first: int,
    progress: Progress,
) -> None:
    """Train from step ``first`` on, with a checkpoint now and then."""
    batches = _minibatches(script, args, is_cut=pipeline.semantics == "flush")
    ahead = pipeline.prepare(islice(batches, _CHECKED))
    if pipeline.worker == 0:
        for note in pipeline.notes:
            print(note, flush=True)
    for step, batch in enumerate(chain(ahead, batches)):
        if step < first:
            continue  # learned from before the checkpoint
        progress.note(step, pipeline.train_step(batch), batch)
        is_due = (step + 1) % args.every == 0 or step + 1 == args.steps
        if args.checkpoints and is_due:
            pipeline.save(args.checkpoints)
            progress.drained()


def _minibatches(
    script: TrainingScript, args: argparse.Namespace, *, is_cut: bool
) -> Iterator[Minibatch]:
    """All minibatches of a run; where ``is_cut``, in the script's microbatches, if it makes any."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        batch: Minibatch = script.make_batch(generator)
        if is_cut and script.cuts_microbatches:
            batch = script.make_microbatches(batch, args.microbatches)
        yield batch
        del batch


def _scheduler_fn(
    script: TrainingScript, args: argparse.Namespace, plan: PipelinePlan
) -> SchedulerFunction | None:
    """The script's scheduler, told how many updates this stage will do: one a round of replicas."""
    if not script.has_scheduler:
        return None
    stage = plan.stages[Pipe(plan.replicas).stages[distributed.get_rank()]]
    a_round = 1 if args.semantics == "flush" else stage.replicas
    return partial(script.make_scheduler, num_steps=-(-args.steps // a_round))


if __name__ == "__main__":
    sys.exit(main())
