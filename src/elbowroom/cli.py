"""The command line: reads flags, hands them on, and turns what happens into exit codes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from elbowroom.api import BatchSettings, errors_beside, run_settings
from elbowroom.cli_flags import add_limits, count, limits_of, number, seconds, size
from elbowroom.cli_pipeline import add_pipeline_commands
from elbowroom.cli_plan import add_plan_commands
from elbowroom.cli_profile import add_profile_command
from elbowroom.core.errors import (
    ElbowroomError,
    InputError,
    JobStoppedError,
    MemoryPlanError,
    OutputError,
)
from elbowroom.core.model import DTYPE_BYTES
from elbowroom.core.plan import FETCH_ORDERS, POOL_MODES, RunPlan
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.check import check_file, print_report
from elbowroom.jobs.journal import JournalReader
from elbowroom.jobs.report import print_summary
from elbowroom.jobs.runner import JobOptions, StopRequest
from elbowroom.jobs.status import job_status, print_status
from elbowroom.jobs.verify import verify_results
from elbowroom.planner import THIS_MACHINE, read_run_plan

_ABOUT = "Offline LLM inference on replicas that hold the feed-forward weights once."
_EXIT_CODES = """\
exit codes:
  0   every row was answered (check, verify: nothing is wrong)
  3   finished, but some rows failed (check: some would; verify: results are not complete)
  75  stopped before the end: finished rows are kept, the same command goes on
  2   bad usage or bad input: nothing was done
  1   a failure inside
"""

_PLANNED = (
    *("model", "memory", "replicas", "tensor_parallel", "pool", "slots", "fetch_order", "ship"),
    *("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "served_model_name"),
    *("seed", "no_prefix_caching"),
)
"""Flags of ``run`` that a plan stands for."""

EXIT_GOOD = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_FAILED_ROWS = 3
EXIT_RESUMABLE = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``elbowroom``. Returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True)
    command: Callable[[argparse.Namespace, Console], int] = args.command
    try:
        return command(args, console)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_GOOD
    except ElbowroomError as error:
        console.print(f"elbowroom: {error}", style="red", markup=False, highlight=False)
        return _exit_code(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("elbowroom: stopped at once; run the same command again to go on")
        return EXIT_RESUMABLE


def _exit_code(error: ElbowroomError) -> int:
    if isinstance(error, JobStoppedError):
        return EXIT_RESUMABLE
    if isinstance(error, InputError | OutputError | MemoryPlanError):
        return EXIT_BAD_INPUT
    return EXIT_FAILURE


def _run(args: argparse.Namespace, console: Console) -> int:
    return asyncio.run(_run_until_signalled(_settings(args), console))


async def _run_until_signalled(settings: BatchSettings, console: Console) -> int:
    """The first signal asks the job to stop, the second ends it."""
    task = asyncio.current_task()
    assert task is not None
    stop = StopRequest()
    loop = asyncio.get_running_loop()

    def on_signal(received: signal.Signals) -> None:
        if stop.reason is None:
            stop(f"stopped by {received.name}")
        else:
            task.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, partial(on_signal, signal_number))
    report = await run_settings(settings, console, stop)
    print_summary(console, report)
    return EXIT_FAILED_ROWS if report.num_failed else EXIT_GOOD


def _check(args: argparse.Namespace, console: Console) -> int:
    report = check_file(args.input, args.model, args.max_model_len, limits_of(args))
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(Console(), report)
    return EXIT_FAILED_ROWS if report.num_problems else EXIT_GOOD


def _status(args: argparse.Namespace, console: Console) -> int:
    with JournalReader(args.output) as journal:
        status = job_status(journal)
    if args.json:
        print(json.dumps(status.to_json(), indent=2))
    else:
        print_status(Console(), status)
    return EXIT_GOOD


def _results(args: argparse.Namespace, console: Console) -> int:
    with JournalReader(args.output) as journal:
        for line in journal.lines({"all": None, "succeeded": True, "failed": False}[args.rows]):
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    return EXIT_GOOD


def _verify(args: argparse.Namespace, console: Console) -> int:
    errors = args.errors or errors_beside(args.output)
    paths = [args.output, *([errors] if args.errors or errors.exists() else [])]
    with BatchFile(args.input, limits_of(args)) as batch:
        verification = verify_results(batch.scan(), paths)
    if args.json:
        print(json.dumps(verification.to_json(), indent=2))
    else:
        print(verification)
    return EXIT_GOOD if verification.is_good else EXIT_FAILED_ROWS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elbowroom",
        description=_ABOUT,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., int], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        return added

    _add_run_flags(add("run", _run, "answer a batch file, or go on with it"))
    check = add("check", _check, "tell all that can be known before a device is touched")
    check.add_argument("input", type=Path, help="OpenAI batch lines")
    check.add_argument("--model", type=Path, help="Hugging Face model folder, to count tokens")
    check.add_argument("--max-model-len", type=count, help="tokens of the longest row")
    check.add_argument("--json", action="store_true", help="for machines")
    add_limits(check)
    status = add("status", _status, "show how far a running or interrupted job is")
    status.add_argument("output", type=Path, help="the --output of the run")
    status.add_argument("--json", action="store_true", help="for machines")
    results = add("results", _results, "print the result lines of what is finished so far")
    results.add_argument("output", type=Path, help="the --output of the run")
    results.add_argument("--rows", choices=("all", "succeeded", "failed"), default="all")
    verify = add("verify", _verify, "check that each row of the input has exactly one result")
    verify.add_argument("input", type=Path, help="OpenAI batch lines")
    verify.add_argument("output", type=Path, help="answers")
    verify.add_argument("--errors", type=Path, help="failed rows (default: beside the output)")
    verify.add_argument("--json", action="store_true", help="for machines")
    add_limits(verify)
    add_plan_commands(add)
    add_pipeline_commands(add)
    add_profile_command(add)
    return parser


def _add_run_flags(run: argparse.ArgumentParser) -> None:
    files = run.add_argument_group("files")
    files.add_argument("--model", type=Path, help="Hugging Face model folder")
    files.add_argument("--input", type=Path, required=True, help="OpenAI batch lines")
    files.add_argument("--output", type=Path, required=True, help="answers, in input order")
    files.add_argument("--errors", type=Path, help="failed rows (default: beside the output)")
    files.add_argument("--report", type=Path, help="report.json (default: beside the output)")
    files.add_argument("--logs", type=Path, help="folder to keep the replicas' logs in")
    layout = run.add_argument_group("layout")
    layout.add_argument(
        "--plan", type=Path, help="of `elbowroom plan --json`: model, layout and engine are its own"
    )
    layout.add_argument("--cluster", default=THIS_MACHINE, help="what predictions are made from")
    layout.add_argument("--replicas", type=count, default=1, help="engines (default 1)")
    layout.add_argument(
        "--tensor-parallel", type=count, default=1, help="devices of one replica (default 1)"
    )
    layout.add_argument("--memory", type=size, help="memory of one device, such as 2GiB")
    layout.add_argument(
        "--pool",
        choices=POOL_MODES,
        default="mapped",
        help="how a replica uses layers that others own (default mapped; none: full copies)",
    )
    layout.add_argument("--slots", type=count, help="buffers for streamed layers (default d-1)")
    layout.add_argument(
        "--ship",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with a streamed pool: ship rows of small batches to owners (default: where it pays)",
    )
    layout.add_argument("--fetch-order", choices=FETCH_ORDERS, default=FETCH_ORDERS[0])
    engine = run.add_argument_group("engine")
    engine.add_argument("--dtype", choices=("auto", *DTYPE_BYTES), default="auto")
    engine.add_argument(
        "--max-model-len", type=count, help="tokens of the longest row (default: what fits)"
    )
    engine.add_argument("--max-num-seqs", type=count, default=256, help="rows at once")
    engine.add_argument("--max-num-batched-tokens", type=count, default=2048)
    engine.add_argument("--served-model-name", action="append", default=[], metavar="NAME")
    engine.add_argument("--seed", type=int, default=0)
    engine.add_argument("--no-prefix-caching", action="store_true")
    job = run.add_argument_group("job")
    defaults = JobOptions()
    job.add_argument(
        "--restart", action="store_true", help="start over: drop what earlier runs finished"
    )
    job.add_argument(
        "--order",
        choices=("auto", "input"),
        default=defaults.order,
        help="in which rows are worked on (default auto: long outputs first, shared prefixes "
        "together); results are in input order",
    )
    job.add_argument(
        "--grace",
        type=seconds,
        default=defaults.grace_seconds,
        metavar="SECONDS",
        help="for rows in flight after the first Ctrl-C (default %(default)g)",
    )
    job.add_argument(
        "--max-restarts",
        type=number,
        default=defaults.max_restarts,
        help="of one replica in ten minutes (default %(default)d)",
    )
    add_limits(run)
    run.add_argument("vllm", nargs="*", metavar="-- VLLM OPTIONS", help="passed on to vLLM")


def _settings(args: argparse.Namespace) -> BatchSettings:
    job = JobOptions(
        limits=limits_of(args),
        order=args.order,
        max_restarts=args.max_restarts,
        grace_seconds=args.grace,
        restart=args.restart,
    )
    plan = None if args.plan is None else _plan_alone(args)
    if plan is None:
        for name in ("model", "memory"):
            if getattr(args, name) is None:
                raise InputError(f"give --{name}, or a --plan that says it")
    return BatchSettings(
        model=Path(plan.model_dir) if plan else args.model,
        memory_bytes=plan.account.memory_bytes if plan else args.memory,
        input=args.input,
        output=args.output,
        errors=args.errors,
        report=args.report,
        logs=args.logs,
        replicas=args.replicas,
        tensor_parallel=args.tensor_parallel,
        pool=args.pool,
        slots=args.slots,
        fetch_order=args.fetch_order,
        ship=args.ship,
        dtype=plan.engine.dtype if plan else args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        served_model_names=tuple(args.served_model_name),
        seed=args.seed,
        prefix_caching=not args.no_prefix_caching,
        vllm_options=tuple(args.vllm),
        job=job,
        cluster=args.cluster,
        given_plan=plan,
    )


def _plan_alone(args: argparse.Namespace) -> RunPlan:
    """The plan. What it says is not said again beside it."""
    parser = argparse.ArgumentParser()
    _add_run_flags(parser)
    for name in _PLANNED:
        if getattr(args, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is what the plan says: leave it out, or plan again with it")
    if args.vllm:
        raise InputError("options for vLLM cannot be given beside a --plan")
    return read_run_plan(args.plan)


if __name__ == "__main__":
    sys.exit(main())
