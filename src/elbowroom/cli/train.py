"""The commands that train: ``train profile``, the three that plan, and ``run``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Literal

from elbowroom.cli.plan_grid import add_plan_grid
from elbowroom.cli.plan_pipeline import add_plan_pipeline
from elbowroom.cli.plan_swap import add_plan_swap
from elbowroom.cli.profile_model import add_profile_model
from elbowroom.cli.screen import Console
from elbowroom.cli.train_swapped import add_swap_flags, run_swapped
from elbowroom.cli.train_workers import add_worker_flags, interrupted, run_workers, stopped
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart
from elbowroom.grid.flags import add_grid_flags
from elbowroom.pipeline.flags import add_pipeline_flags
from elbowroom.plans.grid import is_grid_plan, read_grid_plan
from elbowroom.plans.pipeline import is_pipeline_plan, read_pipeline_plan
from elbowroom.plans.swap import is_swap_plan
from elbowroom.training.run_flags import add_common_flags

_PlanKind = Literal["pipeline", "swap", "grid"]

_FLAGS: dict[_PlanKind, frozenset[str]] = {
    "pipeline": frozenset({"semantics", "microbatches", "tier", "timeout", "max_restarts"}),
    "swap": frozenset({"tier", "enforce", "verify", "picture"}),
    "grid": frozenset({"loss", "exact_randomness", "timeout", "max_restarts"}),
}
"""Flags that not every kind of plan knows."""


def add_train_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    add_profile_model(partial(_needing_torch, add))
    add_plan_pipeline(add)
    add_plan_swap(add)
    add_plan_grid(add)
    run = _needing_torch(
        add,
        "run",
        _run,
        "train on this machine as a plan says: in a pipeline, in a memory budget, or on a grid",
        usage="SCRIPT --plan PLAN --steps STEPS [options]",
        example="elbowroom train run train.py --plan train-plan.json --steps 50",
    )
    add_common_flags(run)
    add_worker_flags(run)
    add_pipeline_flags(run)
    add_swap_flags(run)
    add_grid_flags(run)
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
    kind = _kind_of(args)
    _refuse_others(args, kind)
    if kind == "swap":
        return _run_swapped(args, console)
    if kind == "grid":
        num_workers, add_flags = read_grid_plan(args.plan).procs, add_grid_flags
    else:
        num_workers, add_flags = read_pipeline_plan(args.plan).num_workers, add_pipeline_flags
    console.print(f"{num_workers} workers on this machine, by {args.plan}", highlight=False)
    return run_workers(args, f"elbowroom.{kind}", num_workers, add_flags, console)


def _kind_of(args: argparse.Namespace) -> _PlanKind:
    """The kind of plan that a file holds. Raises InputError for any other file."""
    if is_swap_plan(args.plan):
        return "swap"
    if is_grid_plan(args.plan):
        return "grid"
    if is_pipeline_plan(args.plan):
        return "pipeline"
    raise InputError(
        f"{args.plan} is no plan: make one with train plan-pipeline, plan-swap or plan-grid, and "
        "give what --json wrote"
    )


def _refuse_others(args: argparse.Namespace, kind: _PlanKind) -> None:
    """Raise InputError for a flag that is for other kinds of plans only."""
    others = sorted(frozenset().union(*_FLAGS.values()) - _FLAGS[kind])
    given = [name for name in others if getattr(args, name) != args.parser.get_default(name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(f"{args.plan} is a {kind} plan, which knows no {names}: leave it out")


def _run_swapped(args: argparse.Namespace, console: Console) -> int:
    with interrupted():
        try:
            return run_swapped(args, console)
        except KeyboardInterrupt as stop:
            return stopped(args, str(stop), console)
