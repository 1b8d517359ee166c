"""The commands that train: ``train profile``, the three that plan, and ``run``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

from elbowroom.cli.exit_codes import EXIT_FAILURE
from elbowroom.cli.plan_grid import add_plan_grid
from elbowroom.cli.plan_pipeline import add_plan_pipeline
from elbowroom.cli.plan_swap import add_plan_swap
from elbowroom.cli.profile_model import add_profile_model
from elbowroom.cli.screen import Console
from elbowroom.cli.signals import heard
from elbowroom.cli.train_swapped import add_swap_flags, refuse_others, run_swapped
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart
from elbowroom.core.flag_kinds import number
from elbowroom.pipeline.flags import add_run_flags
from elbowroom.plans.grid import is_grid_plan
from elbowroom.plans.pipeline import is_pipeline_plan, read_pipeline_plan
from elbowroom.plans.swap import is_swap_plan


def add_train_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    add_profile_model(partial(_needing_torch, add))
    add_plan_pipeline(add)
    add_plan_swap(add)
    add_plan_grid(add)
    run = _needing_torch(
        add,
        "run",
        _run,
        "train on this machine as a plan says: in a pipeline, or in a memory budget",
        usage="SCRIPT --plan PLAN --steps STEPS [options]",
        example="elbowroom train run train.py --plan train-plan.json --steps 50",
    )
    add_run_flags(run)
    run.add_argument(
        "--max-restarts",
        type=number,
        default=0,
        help="times that all workers start again after one dies (default 0); with --checkpoints",
    )
    add_swap_flags(run)
    run.set_defaults(parser=run)


def _needing_torch(
    add: Callable[..., argparse.ArgumentParser],
    name: str,
    command: Callable[[argparse.Namespace, Console], int],
    about: str,
    **more: str,
) -> argparse.ArgumentParser:
    """Add a command that says in one line what it needs, where there is no PyTorch."""

    def run(args: argparse.Namespace, console: Console) -> int:
        if importlib.util.find_spec("torch") is None:
            raise InputError("training needs PyTorch: pip install 'elbowroom[train]'")
        return command(args, console)

    return add(name, run, about, **more)


def _run(args: argparse.Namespace, console: Console) -> int:
    inputs = [("the script", args.script), ("--plan", args.plan)]
    check_apart([*inputs, ("--trace", args.trace), ("--picture", args.picture)])
    swaps = is_swap_plan(args.plan)
    if is_grid_plan(args.plan):
        raise InputError(
            f"{args.plan} is a grid plan, which train run cannot carry out yet: give a plan of "
            "train plan-pipeline or train plan-swap"
        )
    if not swaps and not is_pipeline_plan(args.plan):
        raise InputError(
            f"{args.plan} is no plan: make one with train plan-pipeline or train plan-swap, and "
            "give what --json wrote"
        )
    refuse_others(args, swaps=swaps)
    return _run_swapped(args, console) if swaps else _run_pipeline(args, console)


def _run_swapped(args: argparse.Namespace, console: Console) -> int:
    with _interrupted():
        try:
            return run_swapped(args, console)
        except KeyboardInterrupt as stop:
            return _stopped(args, str(stop), console)


def _run_pipeline(args: argparse.Namespace, console: Console) -> int:
    num_workers = read_pipeline_plan(args.plan).num_workers
    console.print(f"{num_workers} workers on this machine, by {args.plan}", highlight=False)
    launcher = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_workers), "--max-restarts", str(args.max_restarts)),
        *("-m", "elbowroom.pipeline"),
    )
    # torchrun sets the same number, with a banner.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # Of its own session: it would answer signals with a traceback. Workers end when it is gone.
    command = [*launcher, *_words(args)]
    with _interrupted(), subprocess.Popen(command, env=environment, start_new_session=True) as run:
        try:
            code = run.wait()
            reason = f"torchrun was stopped by {signal.Signals(-code).name}" if code < 0 else None
        except KeyboardInterrupt as stop:
            run.kill()
            reason = str(stop)
    if reason is None:
        return code
    return _stopped(args, reason, console)


def _stopped(args: argparse.Namespace, reason: str, console: Console) -> int:
    """Exit code of a run that was stopped. Raises KeyboardInterrupt for one that can resume."""
    if args.checkpoints:
        raise KeyboardInterrupt(reason)
    console.print(f"elbowroom: {reason}; without --checkpoints, nothing is kept")
    return EXIT_FAILURE


@contextmanager
def _interrupted() -> Iterator[None]:
    """Have each signal that stops what runs interrupt it, and say which it was."""
    before = {one: signal.signal(one, _interrupt) for one in heard()}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def _words(args: argparse.Namespace) -> list[str]:
    """What the command line said for ``add_run_flags``, as words again."""
    parser = argparse.ArgumentParser(add_help=False)
    add_run_flags(parser)
    words = [str(args.script)]
    for action in parser._actions:
        value = getattr(args, action.dest)
        if action.option_strings and value != action.default:
            words += [action.option_strings[0], str(value)]
    return words
