"""The commands that only look: ``check``, ``status``, ``results`` and ``verify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from elbowroom.app.hub import find_model
from elbowroom.app.plan import served_names
from elbowroom.app.prepare import errors_beside, warnings_for
from elbowroom.cli.exit_codes import CHECK_CODES, EXIT_FAILED_ROWS, EXIT_GOOD, VERIFY_CODES
from elbowroom.cli.flags import add_options, settings_of
from elbowroom.cli.job_flags import add_limits, limits_of
from elbowroom.cli.screen import Console
from elbowroom.core.errors import InputError
from elbowroom.core.files import read_json
from elbowroom.core.flag_kinds import count
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.check import check_file, print_report
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.journal_reader import JournalReader
from elbowroom.jobs.limits import LINES, RowLimits
from elbowroom.jobs.preflight import FileSummary, Warned, warnings
from elbowroom.jobs.status import job_status, print_status
from elbowroom.jobs.verify import verify_results


def add_inspect_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    _add_check(add)
    status = add(
        "status",
        _status,
        "show how far a running or interrupted job is",
        usage="OUTPUT [--json]",
        example="elbowroom status results.jsonl",
    )
    status.add_argument("output", type=Path, help="the --output of the run")
    status.add_argument("--json", action="store_true", help="for machines")
    results = add(
        "results",
        _results,
        "print the result lines of what is finished so far",
        usage="OUTPUT [--rows {all,succeeded,failed}]",
        example="elbowroom results results.jsonl --rows failed",
    )
    results.add_argument("output", type=Path, help="the --output of the run")
    results.add_argument(
        "--rows", choices=("all", "succeeded", "failed"), default="all", help="which (default all)"
    )
    verify = add(
        "verify",
        _verify,
        "check that each row of the input has exactly one result",
        usage="INPUT... OUTPUT [options]",
        example="elbowroom verify requests.jsonl results.jsonl",
        exit_codes=VERIFY_CODES,
    )
    verify.add_argument("input", type=Path, nargs="+", help="OpenAI batch lines, of one job")
    verify.add_argument("output", type=Path, help="answers")
    verify.add_argument("--errors", type=Path, help="failed rows (default: beside the output)")
    verify.add_argument("--json", action="store_true", help="for machines")
    add_options(verify, RowLimits, [LINES])


def _add_check(add: Callable[..., argparse.ArgumentParser]) -> None:
    check = add(
        "check",
        _check,
        "tell all that can be known before a device is touched",
        usage="INPUT... [--model MODEL] [options] [-- VLLM OPTIONS]",
        example="elbowroom check requests.jsonl --model Qwen/Qwen3-0.6B",
        exit_codes=CHECK_CODES,
    )
    check.add_argument("input", type=Path, nargs="+", help="OpenAI batch lines, of one job")
    check.add_argument("--model", help="Hugging Face folder or name on the hub, to count tokens")
    check.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    check.add_argument(
        "--no-tokens", action="store_true", help="do not count tokens, which needs transformers"
    )
    check.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME", help="as for run"
    )
    check.set_defaults(takes_vllm=True)
    check.add_argument(
        "--max-model-len", type=count, help="tokens of the longest row (default: the model's own)"
    )
    check.add_argument("--json", action="store_true", help="for machines")
    add_limits(check)


def _check(args: argparse.Namespace, console: Console) -> int:
    model: Path | None = None
    served: Sequence[str] = ()
    if args.model is not None:
        model = find_model(args.model, args.revision, with_weights=False)
        read_json(model / "config.json")  # whose absence libraries explain in other ways
        served = served_names(model, args.served_model_name)
    with BatchInput(args.input) as source:
        counted = None if args.no_tokens else model
        report = check_file(source, counted, args.max_model_len, limits_of(args), served)
    would_fail = bool(report.num_problems)
    for warning in _warnings(args, model, served, report.summary):
        report.warnings.append(warning.text)
        would_fail = would_fail or warning.num_rows > 0
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_report(Console(), report)
    return EXIT_FAILED_ROWS if would_fail else EXIT_GOOD


def _warnings(
    args: argparse.Namespace, model: Path | None, served: Sequence[str], summary: FileSummary
) -> list[Warned]:
    """What the rows ask for in vain of the model; without one, only what vLLM ignores."""
    if model is None:
        found = warnings(summary, (), (), args.vllm)
    else:
        found = warnings_for(summary, model, served, args.vllm)
    try:
        return list(found)
    except InputError as error:
        return [Warned(str(error), summary.num_requests)]


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
    limits = RowLimits(**settings_of(args, RowLimits, [LINES]))
    with BatchInput(args.input) as source, BatchFile(source, limits) as batch:
        verification = verify_results(batch.scan(), paths)
    if args.json:
        print(json.dumps(verification.to_json(), indent=2))
    else:
        print(verification)
    return EXIT_GOOD if verification.is_good else EXIT_FAILED_ROWS
