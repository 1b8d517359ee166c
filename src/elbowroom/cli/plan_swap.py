"""The command that plans which saved tensors of a step are swapped: ``train plan-swap``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from elbowroom.cli.screen import Console
from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.files import check_apart, check_writable
from elbowroom.core.flag_kinds import bandwidth, count, memory
from elbowroom.core.step_profile import SavedStorage, StepProfile, read_step_profile
from elbowroom.core.trace import write_trace
from elbowroom.core.units import format_bandwidth, format_bytes
from elbowroom.planning.swap.choose import plan_swap, plan_thresholds
from elbowroom.planning.swap.memory import floor_bytes, peak_bytes
from elbowroom.planning.swap.reduction import GradientReduction
from elbowroom.planning.swap.timeline import DISK_LINK, SwapLink, SwapTimeline, simulate_swap
from elbowroom.plans.swap import Recomputed, Swapped, SwapPlan, write_swap_plan
from elbowroom.profiling.tier_speed import tier_speed

_MOST_ROWS = 40
_COLUMNS = ("storage", "made by", "size", "gap", "does", "copies")
_NARROW = ("made by", "size", "does", "copies")
_TEXTS = ("made by", "does", "copies")
_DOES = {Swapped: "swap", Recomputed: "recompute"}
_FULL_WIDTH = 80
"""Columns of a screen that has room for all of the table's."""


def add_plan_swap(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add(
        "plan-swap",
        _plan_swap,
        "choose which saved tensors leave the device, to train in a memory budget",
        usage="PROFILE --budget BUDGET [options]",
        example="elbowroom train plan-swap step.json --budget 6GiB --link 12GB/s --json plan.json",
    )
    plan.add_argument("profile", type=Path, help="a step's profile")
    plan.add_argument(
        "--budget",
        type=memory,
        required=True,
        help="most that a step may hold: weights, gradients, optimizer state and all it saves",
    )
    plan.add_argument(
        "--link",
        type=_rate,
        help="bandwidth to where tensors are swapped, each way, or `measured` (default: a disk's "
        "1.07GB/s out, 0.93 back)",
    )
    plan.add_argument(
        "--tier", type=Path, help="folder for what is swapped, to be measured, and in the plan"
    )
    plan.add_argument(
        "--duplex", action="store_true", help="the link copies both ways at once (default: in turn)"
    )
    plan.add_argument(
        "--no-recompute",
        dest="recompute",
        action="store_false",
        help="make no tensor again instead of moving it",
    )
    plan.add_argument(
        "--replicas",
        type=count,
        help="also predict the step of so many replicas, whose gradients DDP averages",
    )
    plan.add_argument("--network", type=bandwidth, help="bandwidth between replicas, each way")
    plan.add_argument(
        "--shared-link",
        action="store_true",
        help="what replicas send and receive crosses the link too (default: it does not)",
    )
    plan.add_argument("--all", action="store_true", help=f"show more than {_MOST_ROWS} tensors")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan")
    plan.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the simulated step, for Perfetto"
    )


def _plan_swap(args: argparse.Namespace, console: Console) -> int:
    check_apart([("the profile", args.profile), ("--json", args.json), ("--trace", args.trace)])
    reduction = _reduction(args)
    check_writable([path for path in (args.json, args.trace) if path is not None])
    profile = read_step_profile(args.profile)
    link = _link(args)
    plan = plan_swap(profile, args.budget, link, recompute=args.recompute)
    if args.tier is not None:
        plan = replace(plan, tier=str(args.tier.resolve()))
    timeline = simulate_swap(profile, plan, link)
    screen = Console()
    print_swap_plan(screen, profile, plan, timeline, None if args.all else _MOST_ROWS)
    rates = [format_bandwidth(rate) for rate in (link.out_bandwidth, link.in_bandwidth)]
    screen.say(f"link        {rates[0]} out, {rates[1]} back")
    screen.say(f"thresholds  {_thresholds(profile, args.budget, link)}")
    if reduction is not None:
        alone, timeline = timeline, simulate_swap(profile, plan, link, reduction)
        screen.say(f"all-reduce  {_reduced(reduction, alone, timeline)}")
    if args.trace is not None:
        write_trace(args.trace, [*timeline.spans(), *timeline.memory(plan)])
    if args.json is not None:
        write_swap_plan(args.json, plan)
    return 0


def print_swap_plan(
    screen: Console,
    profile: StepProfile,
    plan: SwapPlan,
    timeline: SwapTimeline,
    most_rows: int | None = None,
) -> None:
    """The largest storages in the order in which they are saved, and totals.

    There are fewer columns on a narrow terminal.
    """
    width = screen.width_of(_FULL_WIDTH)
    columns = _COLUMNS if width >= _FULL_WIDTH else _NARROW
    by_size = sorted(profile.storages, key=lambda storage: -storage.num_bytes)[:most_rows]
    in_order = sorted(by_size, key=lambda storage: storage.number)
    rows = (_row(profile, plan, timeline, storage) for storage in in_order)
    screen.print_rows(columns, rows, width, texts=_TEXTS, wraps="copies", cut=("made by",))
    if hidden := len(profile.storages) - len(by_size):
        screen.say(f"and {hidden} smaller ones: --all shows them")
    for name, text in _totals(profile, plan):
        screen.say(f"{name:<11} {text}")


def _rate(text: str) -> float | Literal["measured"]:
    return "measured" if text == "measured" else bandwidth(text)


def _link(args: argparse.Namespace) -> SwapLink:
    """The link that was given, or that of a folder, or else a disk's."""
    if isinstance(args.link, float):
        return SwapLink(args.link, args.link, args.duplex)
    if args.link is None and args.tier is None:
        return replace(DISK_LINK, is_duplex=args.duplex)
    return SwapLink(*tier_speed(args.tier), args.duplex)


def _reduction(args: argparse.Namespace) -> GradientReduction | None:
    """The all-reduce that was asked for. Raises InputError if a part of it is missing."""
    if args.replicas is None and args.network is None and not args.shared_link:
        return None
    if args.replicas is None or args.network is None:
        raise InputError("an all-reduce needs --replicas and --network: give both, or neither")
    return GradientReduction(args.replicas, args.network, shares_link=args.shared_link)


def _reduced(reduction: GradientReduction, alone: SwapTimeline, reduced: SwapTimeline) -> str:
    """The step with its gradients averaged, beside the one without."""
    longer = f", {reduced.seconds / alone.seconds - 1:.1%} longer" if alone.seconds else ""
    crossing = ", over the link too" if reduction.shares_link else ""
    return (
        f"{reduced.seconds:.6f}{longer}: {reduction.num_workers} replicas at "
        f"{format_bandwidth(reduction.bandwidth)}{crossing}"
    )


def _row(
    profile: StepProfile, plan: SwapPlan, timeline: SwapTimeline, storage: SavedStorage
) -> dict[str, str]:
    choice = plan.choice_of.get(storage.number)
    copies = "held elsewhere" if storage.is_held_elsewhere else ""
    if isinstance(choice, Recomputed):
        copies = f"{_time(choice.recipe.seconds)} again"
    elif choice is not None:
        waited = timeline.waited_seconds(storage.number)
        copies = f"{_time(waited)} waited" if waited > 0 else "hidden"
    last = profile.num_ticks if storage.use_tick is None else storage.use_tick
    return {
        "storage": str(storage.number),
        "made by": storage.made_by or "-",
        "size": format_bytes(storage.num_bytes),
        "gap": _time(sum(profile.seconds[storage.pack_tick : last])),
        "does": "keep" if choice is None else _DOES[type(choice)],
        "copies": copies,
    }


def _totals(profile: StepProfile, plan: SwapPlan) -> list[tuple[str, str]]:
    assert plan.budget_bytes is not None
    return [
        ("swapped", f"{len(plan.swapped)} of {len(plan.storages)} saved tensors"),
        ("recomputed", _recomputed(plan)),
        ("moved", f"{format_bytes(plan.out_bytes)} out, {format_bytes(plan.in_bytes)} in"),
        ("static", format_bytes(plan.static_bytes)),
        ("peak", f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}"),
        ("floor", f"{format_bytes(floor_bytes(profile))}, the smallest budget"),
        ("keep all", format_bytes(peak_bytes(profile, ()))),
        ("seconds", _seconds(plan)),
    ]


def _recomputed(plan: SwapPlan) -> str:
    seconds = sum(choice.recipe.seconds for choice in plan.recomputed)
    made = f"{format_bytes(plan.recomputed_bytes)} in {_time(seconds)}"
    return f"{len(plan.recomputed)}" + (f", {made}" if plan.recomputed else "")


def _thresholds(profile: StepProfile, budget_bytes: int, link: SwapLink) -> str:
    """What the paper's rule would take."""
    try:
        return f"{_seconds(plan_thresholds(profile, budget_bytes, link))} (TFLMS)"
    except MemoryPlanError:
        return "do not fit (TFLMS)"


def _seconds(plan: SwapPlan) -> str:
    if not plan.compute_seconds:
        return f"{plan.seconds:.6f}, no compute"
    slowdown = plan.seconds / plan.compute_seconds - 1
    return f"{plan.seconds:.6f}, {slowdown:.1%} slower"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
