"""The commands that plan: ``plan``, ``profile`` and ``simulate``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elbowroom.cli_flags import add_cluster, add_limits, count, limits_of, size
from elbowroom.core.errors import InputError
from elbowroom.core.model import DTYPE_BYTES, STORAGE_BYTES
from elbowroom.core.trace import write_trace
from elbowroom.core.units import format_bytes
from elbowroom.jobs.results import write_atomically
from elbowroom.planner import (
    Planned,
    PlanSettings,
    check_possible,
    explain,
    plan_job,
    read_any_plan,
    run_plan,
    split_cores,
    write_run_plan,
)
from elbowroom.planning.search import Candidate, EngineLimits
from elbowroom.profiling.machine import measure_machine
from elbowroom.simulation import SimulationSettings, print_simulation, simulate_plan

_TABLE_WIDTH = 110
_POOLS = ("none", "mapped", "WaS", "WaS+CaS")


def add_plan_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add("plan", _plan, "compare layouts of a model on a cluster, before anything is loaded")
    plan.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    job = plan.add_mutually_exclusive_group(required=True)
    job.add_argument("--input", type=Path, help="OpenAI batch lines")
    job.add_argument("--lengths", help="PROMPT:OUTPUTxROWS, such as 1024:512x10000 or 64-512:99x50")
    add_cluster(plan)
    plan.add_argument(
        "--memory", type=size, help="for the engine on each device (default: its own)"
    )
    plan.add_argument(
        "--tensor-parallel", type=count, help="only layouts with so many devices each"
    )
    plan.add_argument("--replicas", type=count, help="only layouts with so many replicas")
    plan.add_argument("--pool", choices=_POOLS, help="only layouts with this pool")
    plan.add_argument("--slots", type=count, help="only layouts with so many slots")
    plan.add_argument("--dtype", choices=("auto", *DTYPE_BYTES), default="auto")
    plan.add_argument("--weight-dtype", choices=STORAGE_BYTES, help="as if weights were stored so")
    plan.add_argument("--kv-dtype", choices=STORAGE_BYTES, help="storage of the KV cache")
    plan.add_argument("--max-num-seqs", type=count, default=256, help="rows at once")
    plan.add_argument("--max-num-batched-tokens", type=count, default=2048)
    plan.add_argument("--activations", type=size, help="activation memory (default: derived)")
    plan.add_argument("--calibrate", type=Path, metavar="REPORT", help="report.json of a run")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the best as a plan for run")
    plan.add_argument("--explain", action="store_true", help="show every term of the best")
    add_limits(plan)

    profile = add("profile", _profile, "measure this machine's devices and links")
    profile.add_argument("--out", type=Path, required=True, help="a TOML file for --cluster")
    profile.add_argument(
        "--replicas", type=count, help="devices to make of its cores (default: one per core)"
    )

    simulate = add("simulate", _simulate, "replay a plan's job row by row, and its iterations")
    simulate.add_argument("--plan", type=Path, required=True, help="of `elbowroom plan --json`")
    simulate.add_argument("--cluster", help="as for plan (default: the plan's)")
    job = simulate.add_mutually_exclusive_group()
    job.add_argument("--input", type=Path, help="OpenAI batch lines")
    job.add_argument("--lengths", help="as for plan (default: rows of the plan's mean length)")
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for Perfetto")
    add_limits(simulate)


def _plan(args: argparse.Namespace, console: Console) -> int:
    settings = PlanSettings(
        model=args.model,
        cluster=args.cluster,
        input=args.input,
        lengths=args.lengths,
        memory_bytes=args.memory,
        tensor_parallel=args.tensor_parallel,
        replicas=args.replicas,
        pool=args.pool,
        slots=args.slots,
        dtype=args.dtype,
        weight_dtype=args.weight_dtype,
        kv_dtype=args.kv_dtype,
        engine=EngineLimits(args.max_num_seqs, args.max_num_batched_tokens, args.activations),
        calibrate=args.calibrate,
        limits=limits_of(args),
    )
    planned = plan_job(settings)
    screen = Console()
    screen.width = max(screen.width, _TABLE_WIDTH)
    _print_plan(screen, planned)
    best = check_possible(planned)
    screen.print(f"> {best.layout}: {planned.choice.reason}", highlight=False, soft_wrap=True)
    if args.explain:
        screen.print(_terms(planned, best))
    if args.json is not None:
        write_run_plan(args.json, run_plan(planned, best, settings))
    return 0


def _profile(args: argparse.Namespace, console: Console) -> int:
    num_devices = args.replicas or len(os.sched_getaffinity(0))
    if num_devices > len(os.sched_getaffinity(0)):
        raise InputError(f"{num_devices} devices need as many cores: lower --replicas")
    cluster = measure_machine(split_cores(num_devices))
    write_atomically(args.out, iter([cluster.to_toml().encode()]))
    console.print(f"{num_devices} devices measured: use --cluster {args.out}", highlight=False)
    return 0


def _simulate(args: argparse.Namespace, console: Console) -> int:
    settings = SimulationSettings(
        plan=read_any_plan(args.plan),
        cluster=args.cluster,
        input=args.input,
        lengths=args.lengths,
        limits=limits_of(args),
    )
    simulated = simulate_plan(settings)
    print_simulation(Console(), simulated)
    if args.trace is not None:
        write_trace(args.trace, simulated.trace())
        console.print(f"open {args.trace} in https://ui.perfetto.dev", highlight=False)
    return 0


def _print_plan(screen: Console, planned: Planned) -> None:
    model, cluster = planned.model, planned.cluster
    screen.print(f"{model.name} on {cluster.name}: {planned.about_workload}", highlight=False)
    if not model.is_known_type:
        screen.print(f"model type '{model.model_type}' is not known: planned from its shapes alone")
    if not model.has_weights:
        screen.print("no weight files: shapes follow from the config")
    columns = ("layout", "weights", "slots", "KV tokens", "rows", "tokens/s", "finish")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for candidate in planned.choice.candidates:
        table.add_row(*_row(candidate, planned))
    screen.print(table)


def _row(candidate: Candidate, planned: Planned) -> tuple[str, ...]:
    account = candidate.account
    mark = "> " if candidate is planned.choice.best else "  "
    start = (
        f"{mark}{candidate.layout}",
        format_bytes(account.weight_bytes),
        format_bytes(account.slot_bytes),
        str(max(0, account.num_kv_tokens)),
    )
    if not candidate.fits:
        return (*start, "-", "-", candidate.why_out)
    finish = f"{_time(candidate.seconds)} +-{planned.cluster.uncertainty:.0%}"
    return (*start, str(candidate.rows_at_once), f"{candidate.tokens_per_second:.0f}", finish)


def _terms(planned: Planned, best: Candidate) -> Table:
    table = Table(title="one decode iteration of one replica", title_justify="left", box=None)
    for name in ("term", "value", "unit", "from"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for term in explain(planned, best):
        table.add_row(term.name, f"{term.value:.6g}", term.unit, term.source)
    for name, source in planned.cluster.sources.items():
        table.add_row(name, "", "", source)
    return table


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
