"""The commands that plan: ``plan``, ``profile`` and ``simulate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.table import Table

from elbowroom.app.machine import split_cores
from elbowroom.app.plan import (
    Planned,
    check_possible,
    model_facts,
    plan_job,
    read_workload,
    run_plan,
)
from elbowroom.app.plan_settings import WHAT_IF
from elbowroom.app.plan_table import explain, print_plan_table
from elbowroom.app.simulate import Iterations, Simulated, SimulationSettings, simulate_plan
from elbowroom.cli.flags import add_cluster
from elbowroom.cli.job_flags import (
    DECIDED,
    add_inputs,
    add_limits,
    add_planned,
    limits_of,
    planned_of,
)
from elbowroom.cli.screen import Console
from elbowroom.core import host
from elbowroom.core.errors import InputError
from elbowroom.core.files import write_text
from elbowroom.core.flag_kinds import count
from elbowroom.core.model import DTYPE_BYTES
from elbowroom.core.model_config import is_known_type
from elbowroom.core.parameters import describe_parameters
from elbowroom.core.trace import write_trace
from elbowroom.jobs.inputs import input_name
from elbowroom.planning.pool.search import Candidate
from elbowroom.plans.pool import read_any_plan, write_run_plan
from elbowroom.profiling.machine import measure_machine


def add_plan_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    plan = add(
        "plan",
        _plan,
        "compare layouts of a model on a cluster, before anything is loaded",
        usage="--model MODEL (--input FILE | --lengths LENGTHS) [options] [-- VLLM OPTIONS]",
        example="elbowroom plan --model Qwen/Qwen3-32B --lengths 1024:512x10000 --cluster h200-8",
    )
    job = plan.add_mutually_exclusive_group(required=True)
    add_inputs(job)
    job.add_argument("--lengths", help="PROMPT:OUTPUTxROWS, such as 1024:512x10000 or 64-512:99x50")
    add_cluster(plan)
    add_planned(plan, (*DECIDED, WHAT_IF))
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the best as a plan for run")
    plan.add_argument("--explain", action="store_true", help="show every term of the best")
    add_limits(plan)

    profile = add(
        "profile",
        _profile,
        "measure this machine's devices and links",
        usage="--out OUT [options]",
        example="elbowroom profile --out machine.toml",
    )
    profile.add_argument("--out", type=Path, required=True, help="a TOML file for --cluster")
    profile.add_argument(
        "--replicas", type=count, help="devices to make of its cores (default: one per core)"
    )
    profile.add_argument(
        "--dtype", choices=DTYPE_BYTES, help="to compute in (default: bfloat16, if the CPU can)"
    )

    simulate = add(
        "simulate",
        _simulate,
        "replay a plan's job row by row, and its iterations",
        usage="--plan PLAN [options]",
        example="elbowroom simulate --plan plan.json --trace trace.json",
    )
    simulate.add_argument("--plan", type=Path, required=True, help="of `elbowroom plan --json`")
    simulate.add_argument("--cluster", help="as for plan (default: the plan's)")
    job = simulate.add_mutually_exclusive_group()
    add_inputs(job)
    job.add_argument("--lengths", help="as for plan (default: rows of the plan's mean length)")
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for Perfetto")
    add_limits(simulate)


def _plan(args: argparse.Namespace, console: Console) -> int:
    settings = planned_of(args, (*DECIDED, WHAT_IF))
    model = model_facts(settings, console.say)
    rows, about_rows = read_workload(args.lengths, args.input, settings.model, settings.limits)
    planned = plan_job(settings, model, rows.longest_first(), about_rows, console.say)
    screen = Console()
    _print_plan(screen, planned)
    best = check_possible(planned)
    reason = planned.choice.reason if planned.machines.is_measured else "taken untimed"
    screen.print(f"> {best.layout}: {reason}", highlight=False, soft_wrap=True)
    if (why := planned.why_not_run(best)) is not None:
        runs = planned.best_to_run
        instead = f"the best that it runs: {runs.layout}" if runs else "it runs none that fits"
        screen.print(f"  {why}; {instead}", highlight=False, soft_wrap=True)
    if settings.is_here:
        pool = planned.describe_pool(best, settings)
        screen.print(f"  {pool}", highlight=False, soft_wrap=True)
    if args.explain:
        screen.print(_terms(planned, best))
    if args.json is not None:
        made_for = args.lengths or input_name(args.input)
        write_run_plan(args.json, run_plan(planned, best, settings, made_for))
    return 0


def _profile(args: argparse.Namespace, console: Console) -> int:
    num_devices = args.replicas or len(host.cores())
    if num_devices > len(host.cores()):
        raise InputError(f"{num_devices} devices need as many cores: lower --replicas")
    dtype = args.dtype or host.fastest_dtype("bfloat16")
    cluster = measure_machine(split_cores(num_devices), dtype)
    write_text(args.out, cluster.to_toml())
    console.print(f"{num_devices} devices measured: use --cluster {args.out}", highlight=False)
    return 0


def _simulate(args: argparse.Namespace, console: Console) -> int:
    settings = SimulationSettings(
        plan=read_any_plan(args.plan),
        cluster=args.cluster,
        inputs=args.input,
        lengths=args.lengths,
        limits=limits_of(args),
    )
    simulated = simulate_plan(settings)
    _print_simulation(Console(), simulated)
    if args.trace is not None:
        write_trace(args.trace, simulated.trace())
        console.print(f"open {args.trace} in https://ui.perfetto.dev", highlight=False)
    return 0


def _print_plan(screen: Console, planned: Planned) -> None:
    model, cluster = planned.model, planned.cluster
    named = f"{model.name} ({describe_parameters(model)}) in {model.dtype}"
    about = f"{named} on {cluster.name}: {planned.about_workload}"
    screen.print(about, highlight=False, soft_wrap=True)
    if not is_known_type(model.model_type):
        screen.print(f"model type '{model.model_type}' is not known: planned from its shapes alone")
    if not model.has_weights:
        screen.print("no weight files: shapes follow from the config")
    print_plan_table(screen, planned)


def _terms(planned: Planned, best: Candidate) -> Table:
    table = Table(title="one decode iteration of one replica", title_justify="left", box=None)
    for name in ("term", "value", "unit", "from"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for term in explain(planned, best):
        table.add_row(term.name, f"{term.value:.6g}", term.unit, term.source)
    for name, source in best.cluster.sources.items():
        table.add_row(name, "", "", source)
    return table


def _print_simulation(screen: Console, simulated: Simulated) -> None:
    job = simulated.job
    table = Table(title=str(simulated.layout), title_justify="left", show_header=False, box=None)
    table.add_row("seconds", f"{job.seconds:.1f}")
    table.add_row("output tokens/s", f"{job.tokens_per_second:.1f}")
    rows = ", ".join(str(replica.num_rows) for replica in job.replicas[:16])
    table.add_row("rows by replica", rows)
    first = min(replica.finish_seconds for replica in job.replicas)
    table.add_row("first replica idle after", f"{first:.1f} s")
    modes = sorted({mode for replica in job.replicas for mode in replica.mode_iterations})
    shares = ", ".join(f"{mode} {job.mode_share(mode):.1%}" for mode in modes)
    table.add_row("iterations", shares)
    for iterations in simulated.iterations:
        _add_iterations(table, iterations)
    screen.print(table)


def _add_iterations(table: Table, iterations: Iterations) -> None:
    pool = iterations.pool
    table.add_row(str(iterations), f"{pool.iteration_seconds * 1e3:.2f} ms")
    busy = ", ".join(f"{name} {share:.1%}" for name, share in pool.busy_fractions().items())
    table.add_row("  busy", busy)
    waited = np.mean(pool.waits) / pool.timeline.seconds
    table.add_row("  compute waited", f"{waited:.1%}")
    if pool.slots:
        table.add_row("  slots held at once", str(pool.most_slots(0)))
