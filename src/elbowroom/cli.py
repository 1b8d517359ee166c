"""The command line: reads flags, hands them on, and turns what happens into exit codes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from elbowroom.api import BatchSettings, errors_beside, run_settings
from elbowroom.cli_flags import (
    PLANNED,
    add_inputs,
    add_limits,
    add_planned,
    count,
    limits_of,
    number,
    planned_of,
    seconds,
)
from elbowroom.cli_pipeline import add_pipeline_commands
from elbowroom.cli_plan import add_plan_commands
from elbowroom.cli_profile import add_profile_command
from elbowroom.cli_signals import Signals
from elbowroom.core.errors import (
    ElbowroomError,
    InputError,
    JobStoppedError,
    MemoryPlanError,
    OutputError,
    optional,
)
from elbowroom.hub import complete, find_model
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.check import check_file, print_report
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.journal import JournalReader
from elbowroom.jobs.report import print_summary
from elbowroom.jobs.runner import JobOptions, StopRequest
from elbowroom.jobs.status import job_status, print_status
from elbowroom.jobs.verify import verify_results
from elbowroom.machine import THIS_MACHINE
from elbowroom.planner import PlanSettings, read_run_plan
from elbowroom.plans.pool import RunPlan
from elbowroom.screen import Console

_ABOUT = "Offline LLM inference on replicas that hold the feed-forward weights once."
_EXIT_CODES = """\
exit codes:
  0   every row was answered (check, verify: nothing is wrong)
  3   finished, but some rows failed (check: some would; verify: results are not complete)
  75  stopped before the end: finished rows are kept, the same command goes on
  2   bad usage or bad input: nothing was done
  1   a failure inside
"""

EXIT_GOOD = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_FAILED_ROWS = 3
EXIT_RESUMABLE = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``elbowroom``. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:end], argparse.Namespace(vllm=words[end + 1 :]))
    console = Console(stderr=True)
    command: Callable[[argparse.Namespace, Console], int] = args.command
    try:
        if args.vllm and not args.takes_vllm:
            raise InputError("only `run` and `plan` take options for vLLM, behind --")
        return command(args, console)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_GOOD
    except ElbowroomError as error:
        with suppress(BrokenPipeError):
            console.print(
                f"elbowroom: {error}", style="red", markup=False, highlight=False, soft_wrap=True
            )
        return _exit_code(error)
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        reason = str(error) or "stopped at once"
        console.print(f"elbowroom: {reason}; run the same command again to go on", soft_wrap=True)
        return EXIT_RESUMABLE


def _exit_code(error: ElbowroomError) -> int:
    if isinstance(error, JobStoppedError):
        return EXIT_RESUMABLE
    if isinstance(error, InputError | OutputError | MemoryPlanError):
        return EXIT_BAD_INPUT
    return EXIT_FAILURE


def _run(args: argparse.Namespace, console: Console) -> int:
    stop = StopRequest()
    with Signals(stop) as signals:
        report = asyncio.run(signals.watch(run_settings(_settings(args), console, stop)))
    with optional("summary", lambda text: console.print(text, markup=False)):
        print_summary(console, report)
    return EXIT_FAILED_ROWS if report.num_failed else EXIT_GOOD


def _check(args: argparse.Namespace, console: Console) -> int:
    model = None
    if args.model is not None and not args.no_tokens:
        model = find_model(args.model, args.revision, with_weights=False)
    with BatchInput(args.input) as source:
        report = check_file(source, model, args.max_model_len, limits_of(args))
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
    with BatchInput(args.input) as source, BatchFile(source, limits_of(args)) as batch:
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
        added.set_defaults(command=command, takes_vllm=False)
        return added

    _add_run_flags(add("run", _run, "answer a batch file, or go on with it"))
    check = add("check", _check, "tell all that can be known before a device is touched")
    check.add_argument("input", type=Path, nargs="+", help="OpenAI batch lines, of one job")
    check.add_argument("--model", help="Hugging Face folder or name on the hub, to count tokens")
    check.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    check.add_argument(
        "--no-tokens", action="store_true", help="do not count tokens, which needs transformers"
    )
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
    verify.add_argument("input", type=Path, nargs="+", help="OpenAI batch lines, of one job")
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
    add_inputs(files, required=True)
    files.add_argument("--output", type=Path, required=True, help="answers, in input order")
    files.add_argument("--errors", type=Path, help="failed rows (default: beside the output)")
    files.add_argument("--report", type=Path, help="report.json (default: beside the output)")
    files.add_argument(
        "--logs", type=Path, help="folder for the replicas' logs (default: in the journal's)"
    )
    files.add_argument(
        "--plan", type=Path, help="of `elbowroom plan --json`: model, layout and engine are its own"
    )
    files.add_argument("--cluster", default=THIS_MACHINE, help="what predictions are made from")
    add_planned(run)
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
    run.usage = f"{run.prog} --model MODEL --input FILE --output FILE [options] [-- VLLM OPTIONS]"


def _settings(args: argparse.Namespace) -> BatchSettings:
    job = JobOptions(
        limits=limits_of(args),
        order=args.order,
        max_restarts=args.max_restarts,
        grace_seconds=args.grace,
        restart=args.restart,
    )
    given = None if args.plan is None else _plan_alone(args)
    if given is None:
        plan = planned_of(args, args.cluster, runs_here=True)
    else:
        engine = given.engine
        plan = PlanSettings(
            complete(Path(given.model_dir)), args.cluster, dtype=engine.dtype, runs_here=True
        )
    return BatchSettings(
        inputs=tuple(args.input),
        output=args.output,
        plan=plan,
        errors=args.errors,
        report=args.report,
        logs=args.logs,
        job=job,
        given_plan=given,
    )


def _plan_alone(args: argparse.Namespace) -> RunPlan:
    """The plan. What it says is not said again beside it."""
    parser = argparse.ArgumentParser()
    add_planned(parser)
    for name in PLANNED:
        if getattr(args, name) != ([] if name == "vllm" else parser.get_default(name)):
            flag = "what stands behind --" if name == "vllm" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is what the plan says: leave it out, or plan again with it")
    return read_run_plan(args.plan)


if __name__ == "__main__":
    sys.exit(main())
