"""Flags that commands share: kinds of values, the cluster, and the limits of a row."""

from __future__ import annotations

import argparse

from elbowroom.core.cluster import PRESETS
from elbowroom.core.errors import InputError
from elbowroom.core.units import parse_bandwidth, parse_bytes
from elbowroom.jobs.limits import RowLimits
from elbowroom.planner import THIS_MACHINE


def add_cluster(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cluster",
        default=THIS_MACHINE,
        help=f"{', '.join(PRESETS)}, a TOML file, or {THIS_MACHINE} (default)",
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


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def bandwidth(text: str) -> float:
    try:
        return parse_bandwidth(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds")
    return seconds
