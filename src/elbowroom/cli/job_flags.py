"""Flags about a batch job: its input, the limits of a row, and what the planner decides."""

from __future__ import annotations

import argparse
from pathlib import Path

from elbowroom.app.hub import find_model
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.cli.flags import auto, count, seconds, size
from elbowroom.core.errors import InputError
from elbowroom.core.model import DTYPE_BYTES
from elbowroom.jobs.limits import RowLimits
from elbowroom.plans.pool import FETCH_ORDERS, POOL_MODES

PLANNED = (
    *("model", "revision", "memory", "replicas", "tensor_parallel", "pool", "slots"),
    *("fetch_order", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("served_model_name", "seed", "no_prefix_caching", "vllm"),
)
"""What ``add_planned`` adds, and options for vLLM: a plan stands for all of them."""


def add_planned(parser: argparse.ArgumentParser) -> None:
    """Flags about model, layout and engine. What is "auto", the default, the planner chooses."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="Hugging Face folder, or a name on the hub")
    model.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    layout = parser.add_argument_group("layout")
    layout.add_argument("--replicas", type=auto(count), help="engines with rows of their own")
    layout.add_argument("--tensor-parallel", type=auto(count), help="devices of one replica")
    layout.add_argument(
        "--memory", type=auto(size), help="of one device, such as 2GiB (default: what is free)"
    )
    layout.add_argument(
        "--pool",
        choices=("auto", *POOL_MODES),
        default="auto",
        help="how a replica uses layers that others own: in place (mapped), copied ahead of use "
        "(streamed), copied, or small batches sent to the owner (shipped); none: full copies",
    )
    layout.add_argument("--slots", type=auto(count), help="buffers for streamed layers")
    layout.add_argument("--fetch-order", choices=FETCH_ORDERS, default=FETCH_ORDERS[0])
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype",
        choices=("auto", *DTYPE_BYTES),
        default="auto",
        help="computed in (default: the model's, or float32 where the CPU computes that faster)",
    )
    engine.add_argument(
        "--max-model-len", type=auto(count), help="tokens of the longest row (default: what fits)"
    )
    engine.add_argument(
        "--max-num-seqs", type=auto(count), help="rows at once (default: as many as fit)"
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=auto(count),
        help="tokens of one iteration (default: 2048, or fewer where memory is short)",
    )
    engine.add_argument("--served-model-name", action="append", default=[], metavar="NAME")
    engine.add_argument("--seed", type=int, default=0)
    engine.add_argument("--no-prefix-caching", action="store_true")
    parser.set_defaults(takes_vllm=True)


def planned_of(args: argparse.Namespace, cluster: str, **others: object) -> PlanSettings:
    """What ``add_planned``'s flags say. Finds the model. Raises InputError without one."""
    if args.model is None:
        raise InputError("give --model a Hugging Face folder, or a name on the hub")
    fields = dict[str, object](
        model=find_model(args.model, args.revision, with_weights=bool(others.get("runs_here"))),
        cluster=cluster,
        memory_bytes=args.memory,
        tensor_parallel=args.tensor_parallel,
        replicas=args.replicas,
        pool=None if args.pool == "auto" else args.pool,
        slots=args.slots,
        fetch_order=args.fetch_order,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        served_model_names=tuple(args.served_model_name),
        seed=args.seed,
        prefix_caching=not args.no_prefix_caching,
        vllm_options=tuple(args.vllm),
        limits=limits_of(args),
    )
    return PlanSettings(**{**fields, **others})  # type: ignore[arg-type]


def add_inputs(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=required,
        metavar="FILE",
        help="OpenAI batch lines, plain or compressed (.gz, .zst); several are one job; - is "
        "standard input",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits of a row")
    defaults = RowLimits()
    for flag, kind, default in (
        ("--max-line-bytes", size, defaults.max_line_bytes),
        ("--max-prompt-tokens", count, defaults.max_prompt_tokens),
        ("--max-n", count, defaults.max_n),
        ("--max-stop", count, defaults.max_stop),
        ("--max-logprobs", count, defaults.max_logprobs),
        ("--max-schema-bytes", size, defaults.max_schema_bytes),
        ("--max-regex-bytes", size, defaults.max_regex_bytes),
        ("--max-row-seconds", seconds, defaults.max_row_seconds),
    ):
        shown = "no limit" if default is None else default
        limits.add_argument(flag, type=kind, default=default, help=f"(default {shown})")
    limits.add_argument(
        "--allow-url-host",
        action="append",
        default=[],
        metavar="HOST",
        help="content may be fetched from here (default: from nowhere)",
    )


def limits_of(args: argparse.Namespace) -> RowLimits:
    return RowLimits(
        max_line_bytes=args.max_line_bytes,
        max_prompt_tokens=args.max_prompt_tokens,
        max_n=args.max_n,
        max_stop=args.max_stop,
        max_logprobs=args.max_logprobs,
        max_schema_bytes=args.max_schema_bytes,
        max_regex_bytes=args.max_regex_bytes,
        max_row_seconds=args.max_row_seconds,
        allowed_url_hosts=frozenset(args.allow_url_host),
    )
