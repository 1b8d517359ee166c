"""The command that plans how each layer is split over workers: ``train plan-grid``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from elbowroom.app.machine import THIS_MACHINE, find_cluster, split_cores
from elbowroom.cli.grid_table import print_grid_plan
from elbowroom.cli.screen import Console
from elbowroom.core import host
from elbowroom.core.cluster_file import PRESET_NAMES
from elbowroom.core.errors import InputError
from elbowroom.core.files import check_apart, check_writable
from elbowroom.core.flag_kinds import bandwidth, count, flops, latency, memory
from elbowroom.core.known_nets import KNOWN_NETS, known_net
from elbowroom.core.layer_shapes import ModelShapes, read_model_shapes
from elbowroom.core.units import format_bandwidth, format_bytes, format_flops
from elbowroom.planning.grid.plan import explain_grid, plan_grid
from elbowroom.planning.grid.settings import KNL, Forms, GridLink, GridSettings
from elbowroom.plans.grid import write_grid_plan

_BYTES = GridLink(0.0, 1.0)
"""A link on which a transfer takes as many seconds as it has bytes."""


class _Hardware(NamedTuple):
    """A link between any two workers, what each computes and holds, and a line that says so."""

    link: GridLink
    flops_per_second: float | None
    memory_bytes: int | None
    about: str


def add_plan_grid(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add(
        "plan-grid",
        _plan_grid,
        "choose how each layer is split over workers: by batch, space and features",
        usage="MODEL --procs PROCS --batch BATCH [options]",
        example="elbowroom train plan-grid alexnet --procs 8 --batch 2048 --json grid.json",
    )
    plan.add_argument(
        "model",
        help=f"what train profile --shapes wrote, or one of {', '.join(KNOWN_NETS)}",
    )
    plan.add_argument("--procs", type=count, required=True, help="workers to train on")
    plan.add_argument(
        "--batch", type=count, required=True, help="samples of a minibatch, of all workers together"
    )
    plan.add_argument(
        "--cluster",
        help=f"{PRESET_NAMES}; a TOML file; or {THIS_MACHINE}: for the link, what a device "
        "computes, and its memory",
    )
    plan.add_argument(
        "--latency", type=latency, help="of a message between any two workers (default 2us)"
    )
    plan.add_argument(
        "--bandwidth",
        type=bandwidth,
        help="between any two workers (default 6GB/s, with 2us that of the paper's KNL nodes)",
    )
    plan.add_argument(
        "--flops",
        type=flops,
        help="of one worker, such as 2.9TFLOP/s, for layers that were not measured (default: the "
        "cluster's, or they take no time)",
    )
    plan.add_argument(
        "--memory", type=memory, help="of one worker (default: the cluster's, or any)"
    )
    plan.add_argument(
        "--forms",
        choices=get_args(Forms),
        default="all",
        help="what may be split: as in the paper; linear layers by features, too; or all layers "
        "by all (default)",
    )
    plan.add_argument(
        "--no-overlap",
        dest="overlap",
        action="store_false",
        help="sums of gradients wait for the backward (default: they run behind it)",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan")


def _plan_grid(args: argparse.Namespace, console: Console) -> int:
    profile = None if args.model in KNOWN_NETS else Path(args.model)
    check_apart([("the profile", profile), ("--json", args.json)])
    check_writable([] if args.json is None else [args.json])
    shapes = _shapes(args.model, profile)
    hardware = _hardware(args, console)
    planned = plan_grid(
        shapes,
        args.procs,
        args.batch,
        hardware.link,
        forms=args.forms,
        flops_per_second=hardware.flops_per_second,
        memory_bytes=hardware.memory_bytes,
        overlap=args.overlap,
    )
    counted = explain_grid(shapes, planned.plan, GridSettings(args.procs, args.batch, _BYTES))
    screen = Console()
    screen.say(f"{args.model}: {planned.plan}, forms {args.forms}")
    print_grid_plan(screen, planned, counted)
    screen.say(f"link       {hardware.about}")
    if args.json is not None:
        write_grid_plan(args.json, planned.plan)
    return 0


def _shapes(name: str, profile: Path | None) -> ModelShapes:
    if profile is None:
        return known_net(name)
    if not profile.exists():
        raise InputError(
            f"{name} is no file, and none of {', '.join(KNOWN_NETS)}: make a profile with "
            "train profile SCRIPT --shapes"
        )
    try:
        return read_model_shapes(profile)
    except InputError as error:
        raise InputError(f"{error}; train profile SCRIPT --shapes makes such a file") from error


def _hardware(args: argparse.Namespace, console: Console) -> _Hardware:
    """The link that was given, or a cluster's, or else the paper's."""
    if args.cluster is None:
        link = GridLink(
            KNL.latency_seconds if args.latency is None else args.latency,
            KNL.bandwidth if args.bandwidth is None else args.bandwidth,
        )
        return _Hardware(link, args.flops, args.memory, "; ".join(_about(args, link)))
    if args.latency is not None or args.bandwidth is not None:
        raise InputError("a cluster has links: leave out --cluster, or --latency and --bandwidth")
    cores = split_cores(args.procs) if args.cluster == THIS_MACHINE else None
    cluster = find_cluster(args.cluster, cores, host.fastest_dtype("bfloat16"), console.say)
    between, device = cluster.link(args.procs), cluster.device
    link = GridLink(between.latency_seconds, between.bandwidth.achieved)
    rate = args.flops if args.flops is not None else device.flops.achieved
    limit = args.memory if args.memory is not None else device.usable_bytes
    about = (
        f"{_rates(link)}: {between.name} of {cluster.name}; a device computes "
        f"{format_flops(rate)} and holds {format_bytes(limit)}"
    )
    return _Hardware(link, rate, limit, about)


def _about(args: argparse.Namespace, link: GridLink) -> Iterator[str]:
    yield _rates(link)
    if args.latency is None and args.bandwidth is None:
        yield "the paper's KNL nodes, as no --cluster and no --bandwidth are given"


def _rates(link: GridLink) -> str:
    return f"{link.latency_seconds * 1e6:.4g} us, {format_bandwidth(link.bandwidth)}"
