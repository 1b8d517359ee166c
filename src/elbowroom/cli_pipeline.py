"""The command that plans pipelines of training: ``plan-pipeline``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elbowroom.cli_flags import add_cluster, bandwidth, count, size
from elbowroom.core.pipedream_text import read_layer_graph
from elbowroom.core.pipeline_plan import (
    OPTIMIZERS,
    OVERLAPS,
    SYNCS,
    Level,
    PipelineOptions,
    PipelinePlan,
    Stage,
)
from elbowroom.core.units import format_bandwidth, format_bytes
from elbowroom.jobs.results import write_atomically
from elbowroom.planner import THIS_MACHINE, find_cluster, split_cores
from elbowroom.planning.pipeline import plan_on_levels, plan_pipeline

_TABLE_WIDTH = 110
_COLUMNS = ("stage", "layers", "replicas", "seconds", "transfer", "in flight", "memory", "bytes")


def add_pipeline_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add("plan-pipeline", _plan_pipeline, "split a model into stages, to train it as a pipe")
    plan.add_argument("profile", type=Path, help="a layer graph: our JSON, or PipeDream's text")
    plan.add_argument("--workers", type=count, required=True, help="devices to train on")
    links = plan.add_mutually_exclusive_group()
    add_cluster(links)
    links.add_argument(
        "--bandwidth", type=bandwidth, help="between any two workers, such as 10Gbit/s"
    )
    plan.add_argument(
        "--sync",
        choices=SYNCS,
        default="ps",
        help="bytes that m replicas move: 4(m-1)/m of the weights (ps), or 2(m-1)/m (allreduce)",
    )
    plan.add_argument(
        "--overlap", choices=OVERLAPS, default="max", help="sync behind compute, or added to it"
    )
    plan.add_argument("--memory", type=size, help="of one worker (default: the cluster's, if any)")
    plan.add_argument(
        "--optimizer",
        choices=("none", *OPTIMIZERS),
        default="adamw",
        help="whose state and gradients count in memory (default adamw, which "
        "elbowroom.pipeline trains with; none: as in the papers)",
    )
    plan.add_argument("--straight", action="store_true", help="one worker for each stage")
    plan.add_argument("--fewer-workers", action="store_true", help="some may stay idle")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan")


def _plan_pipeline(args: argparse.Namespace, console: Console) -> int:
    options = PipelineOptions(
        sync=args.sync,
        overlap=args.overlap,
        memory_limit_bytes=args.memory,
        straight=args.straight,
        fewer_workers=args.fewer_workers,
        optimizer=None if args.optimizer == "none" else args.optimizer,
    )
    graph = read_layer_graph(args.profile)
    if args.bandwidth is not None:
        plan = plan_on_levels(graph, (Level(args.workers, args.bandwidth),), options)
    else:
        is_here = args.cluster == THIS_MACHINE
        cores = split_cores(args.workers) if is_here else None
        cluster = find_cluster(args.cluster, cores, lambda text: console.print(text))
        plan = plan_pipeline(graph, cluster, args.workers, options)
    screen = Console()
    screen.width = max(screen.width, _TABLE_WIDTH)
    _print_plan(screen, args.profile.name, plan)
    if args.json is not None:
        text = json.dumps(plan.to_json(), indent=2) + "\n"
        write_atomically(args.json, iter([text.encode()]))
    return 0


def _print_plan(screen: Console, name: str, plan: PipelinePlan) -> None:
    def say(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    topology = ", ".join(f"{x.name} {format_bandwidth(x.bandwidth)}" for x in plan.levels)
    say(f"{name} on {plan.num_workers} workers ({topology}), sync {plan.options.sync}: {plan}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "layers" else "right", no_wrap=True)
    for number, stage in enumerate(plan.stages):
        table.add_row(*_row(number, stage))
    screen.print(table)
    other = plan.data_parallel
    say(
        f"{plan.seconds:.6f} s a minibatch, {plan.noam} in flight; data parallel "
        f"{other.seconds:.6f} s: {plan.speedup:.2f}x as fast"
    )
    for level in plan.traffic:
        say(
            f"{level.name}: {format_bytes(level.num_bytes)} a minibatch; data parallel "
            f"{format_bytes(level.data_parallel_bytes)}: {level.saved:.1%} less"
        )
    most = max(stage.memory_bytes for stage in plan.stages)
    say(
        f"memory of one worker: up to {format_bytes(most)}; data parallel "
        f"{format_bytes(other.memory_bytes)}"
    )
    if not plan.is_exact:
        say(f"the graph has more cuts than can be searched: the best of {plan.num_cuts} was taken")


def _row(number: int, stage: Stage) -> tuple[str, ...]:
    first, last = stage.layers[0], stage.layers[-1]
    names = first if first == last else f"{first} .. {last}"
    return (
        str(number),
        f"{len(stage.layers)}: {names}",
        str(stage.replicas),
        f"{stage.seconds:.6f}",
        f"{stage.transfer_seconds:.6f}",
        str(stage.in_flight),
        format_bytes(stage.memory_bytes),
        format_bytes(stage.sync_bytes + stage.transfer_bytes),
    )
