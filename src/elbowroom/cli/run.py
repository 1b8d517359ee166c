"""The command ``run``: flags to settings, and the job under signals."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from pathlib import Path

from elbowroom.app.batch import run_settings
from elbowroom.app.hub import complete
from elbowroom.app.machine import THIS_MACHINE
from elbowroom.app.plan import read_run_plan
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.app.prepare import BatchSettings
from elbowroom.cli.exit_codes import EXIT_FAILED_ROWS, EXIT_GOOD, RUN_CODES
from elbowroom.cli.flags import add_options, settings_of
from elbowroom.cli.job_flags import (
    add_inputs,
    add_limits,
    add_planned,
    given_flags,
    limits_of,
    planned_of,
)
from elbowroom.cli.screen import Console
from elbowroom.cli.signals import Signals
from elbowroom.core.errors import InputError, optional
from elbowroom.jobs.job import JobOptions, StopRequest
from elbowroom.jobs.report import print_summary
from elbowroom.plans.pool import RunPlan


def add_run_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    run = add(
        "run",
        _run,
        "answer a batch file, or resume one",
        usage="--model MODEL --input FILE --output FILE [options] [-- VLLM OPTIONS]\n"
        "--plan PLAN --input FILE --output FILE [options]",
        example="elbowroom run --model Qwen/Qwen3-0.6B --input requests.jsonl \\\n"
        "      --output results.jsonl",
        exit_codes=RUN_CODES,
    )
    _add_run_flags(run)


def _run(args: argparse.Namespace, console: Console) -> int:
    stop = StopRequest()
    with Signals(stop) as signals:
        report = asyncio.run(signals.watch(run_settings(_settings(args), console, stop)))
    with optional("summary", lambda text: console.print(text, markup=False)):
        print_summary(console, report)
    return EXIT_FAILED_ROWS if report.num_failed else EXIT_GOOD


def _add_run_flags(run: argparse.ArgumentParser) -> None:
    files = run.add_argument_group("files")
    add_inputs(files, required=True)
    files.add_argument(
        "--output", type=Path, required=True, help="answers, in input order; .parquet: a table"
    )
    files.add_argument(
        "--plan", type=Path, help="of `elbowroom plan --json`: model, layout and engine are its own"
    )
    files.add_argument("--cluster", default=THIS_MACHINE, help="what predictions are made from")
    add_options(run, BatchSettings)
    add_planned(run)
    add_options(run, JobOptions)
    add_limits(run)


def _settings(args: argparse.Namespace) -> BatchSettings:
    job = JobOptions(limits=limits_of(args), **settings_of(args, JobOptions))
    given = None if args.plan is None else _plan_alone(args)
    if given is None:
        plan = planned_of(args, runs_here=True)
    else:
        engine = given.engine
        plan = PlanSettings(
            complete(Path(given.model_dir)), args.cluster, dtype=engine.dtype, runs_here=True
        )
    return BatchSettings(
        inputs=tuple(args.input),
        output=args.output,
        plan=plan,
        job=job,
        given_plan=given,
        **settings_of(args, BatchSettings),
    )


def _plan_alone(args: argparse.Namespace) -> RunPlan:
    """The plan. What it says is not said again beside it."""
    for flag in given_flags(args):
        raise InputError(f"{flag} is what the plan says: leave it out, or plan again with it")
    return read_run_plan(args.plan)
