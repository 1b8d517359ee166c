"""The command line: reads flags, makes a plan, hands it to the job. No logic of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elbowroom.core.errors import ElbowroomError, InputError, MemoryPlanError, OutputError
from elbowroom.core.model import DTYPE_BYTES, ModelFacts, read_model
from elbowroom.core.plan import (
    FETCH_ORDERS,
    POOL_MODES,
    EngineOptions,
    MemoryAccount,
    PoolMode,
    PoolShare,
    RunPlan,
)
from elbowroom.core.units import format_bytes, parse_bytes
from elbowroom.jobs.batch_file import scan
from elbowroom.jobs.report import print_summary
from elbowroom.jobs.runner import JobFiles, run_job
from elbowroom.jobs.spool import check_paths
from elbowroom.planning.memory import account_memory, check_fits, longest_row
from elbowroom.planning.pool import plan_shares

_ABOUT = "Offline LLM inference on replicas that hold the feed-forward weights once."

EXIT_GOOD = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``elbowroom``. Returns the exit code; see ``docs/structure.md``."""
    args = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        return asyncio.run(_run(args, console))
    except (InputError, OutputError, MemoryPlanError) as error:
        console.print(f"elbowroom: {error}", style="red", markup=False, highlight=False)
        return EXIT_BAD_INPUT
    except ElbowroomError as error:
        console.print(f"elbowroom: {error}", style="red", markup=False, highlight=False)
        return EXIT_FAILURE
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("elbowroom: stopped; nothing was published")
        return EXIT_INTERRUPTED


async def _run(args: argparse.Namespace, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    files = _files(args)
    check_paths(files.input, files.output, files.errors, files.report)
    model = read_model(args.model, args.dtype)
    plan = _plan(args, model)
    console.print(_account_table(args, model))
    check_fits(plan.account, plan.engine.max_model_len)
    facts = scan(files.input)
    report = await run_job(plan, files, facts, console)
    print_summary(console, report)
    return EXIT_FAILED_ROWS if report.num_failed else EXIT_GOOD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elbowroom", description=_ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="answer a batch file",
        description="Answer an OpenAI batch file with replicas that hold the feed-forward weights "
        "once. Options after -- go to vLLM.",
    )
    files = run.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, help="Hugging Face model folder")
    files.add_argument("--input", type=Path, required=True, help="OpenAI batch lines")
    files.add_argument("--output", type=Path, required=True, help="answers, in input order")
    files.add_argument("--errors", type=Path, help="failed rows (default: beside the output)")
    files.add_argument("--report", type=Path, help="report.json (default: beside the output)")
    files.add_argument("--logs", type=Path, help="folder to keep the replicas' logs in")
    layout = run.add_argument_group("layout")
    layout.add_argument("--replicas", type=_count, default=1, help="engines (default 1)")
    layout.add_argument(
        "--memory", type=_size, required=True, help="device memory of one replica, such as 2GiB"
    )
    layout.add_argument(
        "--pool",
        choices=POOL_MODES,
        default="mapped",
        help="how a replica uses layers that others own (default mapped; none: full copies)",
    )
    layout.add_argument("--slots", type=_count, help="buffers for streamed layers (default d-1)")
    layout.add_argument("--fetch-order", choices=FETCH_ORDERS, default=FETCH_ORDERS[0])
    engine = run.add_argument_group("engine")
    engine.add_argument("--dtype", choices=("auto", *DTYPE_BYTES), default="auto")
    engine.add_argument(
        "--max-model-len", type=_count, help="tokens of the longest row (default: what fits)"
    )
    engine.add_argument("--max-num-seqs", type=_count, default=256, help="rows at once")
    engine.add_argument("--max-num-batched-tokens", type=_count, default=2048)
    engine.add_argument("--served-model-name", action="append", default=[], metavar="NAME")
    engine.add_argument("--seed", type=int, default=0)
    engine.add_argument("--no-prefix-caching", action="store_true")
    run.add_argument("vllm", nargs="*", metavar="-- VLLM OPTIONS", help="passed on to vLLM")
    return parser


def _files(args: argparse.Namespace) -> JobFiles:
    output: Path = args.output
    return JobFiles(
        input=args.input,
        output=output,
        errors=args.errors or output.parent / f"{output.stem}.errors.jsonl",
        report=args.report or output.parent / f"{output.stem}.report.json",
        logs=args.logs,
    )


def _plan(args: argparse.Namespace, model: ModelFacts) -> RunPlan:
    shares = _shares(args, model, args.pool)
    account = _account(args, model, args.pool)
    names = (*args.served_model_name, model.name, str(args.model))
    return RunPlan(
        model_dir=str(args.model),
        account=account,
        shares=shares,
        cores=split_cores(args.replicas),
        engine=EngineOptions(
            dtype=model.dtype,
            max_model_len=args.max_model_len or longest_row(model, account),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            served_model_names=tuple(dict.fromkeys(names)),
            seed=args.seed,
            prefix_caching=not args.no_prefix_caching,
            extra=tuple(args.vllm),
        ),
    )


def _shares(args: argparse.Namespace, model: ModelFacts, mode: PoolMode) -> tuple[PoolShare, ...]:
    return plan_shares(model.ffn_bytes(), args.replicas, mode, args.slots, args.fetch_order)


def _account(args: argparse.Namespace, model: ModelFacts, mode: PoolMode) -> MemoryAccount:
    return account_memory(
        model,
        _shares(args, model, mode),
        args.memory,
        args.max_num_batched_tokens,
        args.max_num_seqs,
    )


def _account_table(args: argparse.Namespace, model: ModelFacts) -> Table:
    """Where one replica's memory goes, for the layout asked for and for the others."""
    title = f"{model.name}: {args.replicas} x {format_bytes(args.memory)} ({model.dtype})"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("pool", "replicated", "own FFN", "slots", "workspace", "KV", "KV tokens"):
        table.add_column(column, justify="right")
    for mode in POOL_MODES:
        account = _account(args, model, mode)
        table.add_row(
            f"> {mode}" if mode == args.pool else mode,
            format_bytes(account.replicated_bytes),
            format_bytes(account.ffn_bytes),
            format_bytes(account.slot_bytes),
            format_bytes(account.workspace_bytes),
            format_bytes(account.kv_bytes),
            str(account.num_kv_tokens) if account.kv_bytes > 0 else "does not fit",
        )
    return table


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def split_cores(num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """The cores of this process, divided among replicas; with too few, replicas share cores."""
    cores = sorted(os.sched_getaffinity(0))
    if num_replicas > len(cores):
        return tuple((cores[rank % len(cores)],) for rank in range(num_replicas))
    bounds = [rank * len(cores) // num_replicas for rank in range(num_replicas + 1)]
    return tuple(tuple(cores[start:end]) for start, end in pairwise(bounds))


if __name__ == "__main__":
    sys.exit(main())
