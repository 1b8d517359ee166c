"""The command that plans training pipelines: ``train plan-pipeline``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from elbowroom.app.machine import THIS_MACHINE, find_cluster, split_cores
from elbowroom.cli.flags import add_cluster
from elbowroom.cli.screen import Console
from elbowroom.core import host
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart, check_writable, write_json
from elbowroom.core.flag_kinds import bandwidth, count, memory
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.core.trace import write_trace
from elbowroom.core.units import format_bandwidth, format_bytes
from elbowroom.planning.pipeline.plan import plan_on_levels, plan_pipeline
from elbowroom.planning.pipeline.prediction import (
    PipelinePrediction,
    alternatives,
    fastest,
    predict,
    with_prediction,
)
from elbowroom.plans.pipeline import (
    OPTIMIZERS,
    OVERLAPS,
    PLANNED_SEMANTICS,
    SYNCS,
    Level,
    PipelineOptions,
    PipelinePlan,
    StagePlan,
)

_TABLE_WIDTH = 110
_COLUMNS = (
    *("stage", "layers", "replicas", "seconds", "transfer", "idle", "in flight", "memory"),
    "bytes",
)
_TOO_LONG = "to simulate so many stages and workers takes more than a second"
RANKS = ("formula", "simulated")


def add_plan_pipeline(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add(
        "plan-pipeline",
        _plan_pipeline,
        "split a model into stages, to train it as a pipe",
        usage="PROFILE --workers WORKERS [options]",
        example="elbowroom train plan-pipeline lm.json --workers 2 --json train-plan.json",
    )
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
    plan.add_argument("--memory", type=memory, help="of one worker (default: the cluster's)")
    plan.add_argument(
        "--swap-bandwidth",
        type=bandwidth,
        help="between a worker and where it may swap, such as 12GB/s: what minibatches in flight "
        "have saved leaves in stages that exceed the memory otherwise",
    )
    plan.add_argument(
        "--depth",
        type=count,
        default=1,
        help="minibatches in flight, as a multiple of PipeDream's: 2 hides transfers, costs "
        "memory, and weights are older (default 1)",
    )
    plan.add_argument(
        "--sort-by",
        choices=RANKS,
        default="formula",
        help="take the best by PipeDream's formula (default), or the fastest simulated of it, of "
        "straight and data parallel plans, at depths 1 and 2",
    )
    plan.add_argument(
        "--optimizer",
        choices=("none", *OPTIMIZERS),
        default="adamw",
        help="whose state and gradients count in memory (default adamw, which "
        "elbowroom.pipeline trains with; none: as in the papers)",
    )
    plan.add_argument(
        "--semantics",
        choices=PLANNED_SEMANTICS,
        default="stash",
        help="of the weights: those of a minibatch's forward are kept (default), or predicted, "
        "which takes one version more",
    )
    plan.add_argument("--straight", action="store_true", help="one worker for each stage")
    plan.add_argument("--fewer-workers", action="store_true", help="some may stay idle")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan")
    plan.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the simulated run, for Perfetto"
    )


def _plan_pipeline(args: argparse.Namespace, console: Console) -> int:
    check_apart([("the profile", args.profile), ("--json", args.json), ("--trace", args.trace)])
    check_writable([path for path in (args.json, args.trace) if path is not None])
    options = PipelineOptions(
        sync=args.sync,
        overlap=args.overlap,
        memory_limit_bytes=args.memory,
        straight=args.straight,
        fewer_workers=args.fewer_workers,
        depth=args.depth,
        optimizer=None if args.optimizer == "none" else args.optimizer,
        semantics=args.semantics,
        swap_bandwidth=args.swap_bandwidth,
    )
    graph = read_layer_graph(args.profile)
    if args.bandwidth is not None:
        plan = plan_on_levels(graph, (Level(args.workers, args.bandwidth),), options)
    else:
        is_here = args.cluster == THIS_MACHINE
        cores = split_cores(args.workers) if is_here else None
        cluster = find_cluster(
            args.cluster, cores, host.fastest_dtype("bfloat16"), lambda text: console.print(text)
        )
        plan = plan_pipeline(graph, cluster, args.workers, options)
    screen = Console()
    screen.width = max(screen.width, _TABLE_WIDTH)
    if args.sort_by == "simulated":
        plan = _rank(screen, alternatives(plan, graph), graph)
    prediction = predict(plan, graph)
    plan = with_prediction(plan, prediction)
    _print_plan(screen, args.profile.name, plan, prediction)
    if args.trace is not None:
        if prediction is None:
            raise InputError(f"no trace: {_TOO_LONG}")
        write_trace(args.trace, prediction.timeline.spans())
    if args.json is not None:
        write_json(args.json, plan.to_json())
    return 0


def _rank(screen: Console, plans: tuple[PipelinePlan, ...], graph: LayerGraph) -> PipelinePlan:
    """Shows what each plan takes, and gives the fastest."""
    simulated = tuple(with_prediction(plan, predict(plan, graph)) for plan in plans)
    for plan in simulated:
        shown = "not simulated"
        if plan.simulated_seconds is not None:
            shown = f"{plan.simulated_seconds:.6f} s simulated"
        screen.say(f"{plan}, depth {plan.options.depth}: {plan.seconds:.6f} s planned, {shown}")
    return fastest(simulated)


def _print_plan(
    screen: Console, name: str, plan: PipelinePlan, prediction: PipelinePrediction | None
) -> None:
    topology = ", ".join(f"{x.name} {format_bandwidth(x.bandwidth)}" for x in plan.levels)
    depth = f", depth {plan.options.depth}" if plan.options.depth > 1 else ""
    screen.say(
        f"{name} on {plan.num_workers} workers ({topology}), sync {plan.options.sync}{depth}: "
        f"{plan}",
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    swaps = any(stage.swapped_bytes for stage in plan.stages)
    for column in (*_COLUMNS, *(("swapped",) if swaps else ())):
        table.add_column(column, justify="left" if column == "layers" else "right", no_wrap=True)
    for number, stage in enumerate(plan.stages):
        idle = f"{max(0.0, prediction.idle[number]):.1%}" if prediction else "?"
        table.add_row(*_row(number, stage, idle), *_swapped(stage, swaps))
    screen.print(table)
    screen.say(_times(plan))
    for level in plan.traffic:
        screen.say(
            f"{level.name}: {format_bytes(level.num_bytes)} a minibatch; data parallel "
            f"{format_bytes(level.data_parallel_bytes)}: {level.saved:.1%} less",
        )
    most = max(stage.memory_bytes for stage in plan.stages)
    screen.say(
        f"memory of one worker: up to {format_bytes(most)}; data parallel "
        f"{format_bytes(plan.data_parallel.memory_bytes)}",
    )
    if swaps:
        screen.say(_swapping(plan))
    if not plan.is_exact:
        screen.say(
            f"the graph has more cuts than can be searched: the best of {plan.num_cuts} was taken",
        )


def _times(plan: PipelinePlan) -> str:
    other = plan.data_parallel
    planned = (
        f"{plan.seconds:.6f} s a minibatch, {plan.stages[0].in_flight} in flight; data parallel "
        f"{other.seconds:.6f} s: {plan.speedup:.2f}x as fast"
    )
    if plan.simulated_seconds is None:
        return f"{planned}\nnot simulated: {_TOO_LONG}"
    return (
        f"{planned}\nsimulated: {plan.simulated_seconds:.6f} s a minibatch while the pipe is full"
    )


def _swapping(plan: PipelinePlan) -> str:
    """What leaves in which stages, and what the plan would need otherwise."""
    limit, rate = plan.options.memory_limit_bytes, plan.options.swap_bandwidth
    swapped = ", ".join(
        f"{format_bytes(stage.swapped_bytes)} in stage {number}"
        for number, stage in enumerate(plan.stages)
        if stage.swapped_bytes
    )
    without = max(stage.memory_bytes + stage.spared_bytes for stage in plan.stages)
    return (
        f"fits {format_bytes(limit or 0)} as each minibatch swaps {swapped}, at "
        f"{format_bandwidth(rate or 0)}; without swapping {format_bytes(without)}"
    )


def _swapped(stage: StagePlan, is_shown: bool) -> tuple[str, ...]:
    if not is_shown:
        return ()
    return (format_bytes(stage.swapped_bytes) if stage.swapped_bytes else "-",)


def _row(number: int, stage: StagePlan, idle: str) -> tuple[str, ...]:
    first, last = stage.layers[0], stage.layers[-1]
    names = first if first == last else f"{first} .. {last}"
    return (
        str(number),
        f"{len(stage.layers)}: {names}",
        str(stage.replicas),
        f"{stage.seconds:.6f}",
        f"{stage.transfer_seconds:.6f}",
        idle,
        str(stage.in_flight),
        format_bytes(stage.memory_bytes),
        format_bytes(stage.sync_bytes + stage.transfer_bytes),
    )
