"""Train the model of a script on a grid; torchrun starts a process for every worker.

torchrun --nproc-per-node 4 -m elbowroom.grid SCRIPT --plan grid.json --steps 200
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import torch
from torch import distributed

from elbowroom.core.errors import InputError
from elbowroom.grid.flags import add_grid_flags
from elbowroom.grid.grid import Grid, SchedulerFunction
from elbowroom.grid.options import GridOptions
from elbowroom.grid.report import summary, write_grid_trace
from elbowroom.plans.grid import GridPlan, read_grid_plan
from elbowroom.training.loop import dtype_of, num_samples
from elbowroom.training.losses import LossLog
from elbowroom.training.script import TrainingScript, load_script
from elbowroom.training.worker import check_outputs, join, worker_main, worker_parser


def main() -> int:
    return worker_main(build_parser(), _train)


def build_parser() -> argparse.ArgumentParser:
    return worker_parser("elbowroom.grid", __doc__, add_grid_flags)


def _train(args: argparse.Namespace) -> None:
    check_outputs(args)
    script, plan = load_script(args.script), read_grid_plan(args.plan)
    join(args)
    grid = _make_grid(script, plan, args)
    first = grid.restore(args.checkpoints) if args.checkpoints else 0
    if first >= args.steps:
        raise InputError(f"{args.checkpoints} has learned from {first} already: raise --steps")
    log = LossLog()
    seconds = _run_steps(grid, script, args, first, log)
    grid.close()
    lines = summary(grid, log, seconds)
    if grid.worker == 0:
        print("\n".join(lines), flush=True)
    if args.trace:
        write_grid_trace(args.trace, grid)
    distributed.barrier()
    distributed.destroy_process_group()


def _make_grid(script: TrainingScript, plan: GridPlan, args: argparse.Namespace) -> Grid:
    options = GridOptions(
        seed=args.seed,
        loss=args.loss,
        clip_norm=args.clip_norm,
        autocast=dtype_of(args.autocast),
        exact_randomness=args.exact_randomness,
        keeps_record=args.trace is not None,
    )
    scheduler_fn: SchedulerFunction | None = None
    if script.has_scheduler:
        scheduler_fn = partial(script.make_scheduler, num_steps=args.steps)
    model, optimizer_fn = script.make_model(args.seed), script.optimizer_fn(args.lr)
    return Grid(model, plan, optimizer_fn, script.loss_fn, options, scheduler_fn)


def _run_steps(
    grid: Grid, script: TrainingScript, args: argparse.Namespace, first: int, log: LossLog
) -> list[float]:
    """Train from step ``first`` on, with a checkpoint now and then; gives each step's seconds."""
    generator = torch.Generator().manual_seed(args.seed)
    seconds = []
    for step in range(args.steps):
        batch = script.make_batch(generator)
        if step < first:
            continue  # learned from before the checkpoint
        begin = time.perf_counter()
        loss = grid.train_step(batch)
        seconds.append(time.perf_counter() - begin)
        line = log.note(step + 1, loss, num_samples(batch[0]))
        if line and grid.worker == 0:
            print(line, flush=True)
        if args.checkpoints and ((step + 1) % args.every == 0 or step + 1 == args.steps):
            grid.save(args.checkpoints)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
