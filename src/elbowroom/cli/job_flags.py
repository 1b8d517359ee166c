"""Flags about a batch job: its input, the limits of a row, and what the planner decides."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from elbowroom.app.hub import find_model
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.cli.flags import add_options, settings_of
from elbowroom.core.errors import InputError
from elbowroom.jobs.limits import RowLimits

DECIDED = ("layout", "engine")
"""Groups of options that a plan decides. What is "auto", the default, the planner chooses."""


def add_planned(parser: argparse.ArgumentParser, groups: Collection[str] = DECIDED) -> None:
    """Flags about model, layout and engine."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="Hugging Face folder, or a name on the hub")
    model.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    add_options(parser, PlanSettings, groups)
    parser.set_defaults(takes_vllm=True)


def planned_of(
    args: argparse.Namespace, groups: Collection[str] = DECIDED, *, runs_here: bool = False
) -> PlanSettings:
    """What ``add_planned``'s flags say. Finds the model. Raises InputError without one."""
    if args.model is None:
        raise InputError("give --model a Hugging Face folder, or a name on the hub")
    return PlanSettings(
        model=find_model(args.model, args.revision, with_weights=runs_here),
        cluster=args.cluster,
        vllm_options=tuple(args.vllm),
        limits=limits_of(args),
        runs_here=runs_here,
        **settings_of(args, PlanSettings, groups),
    )


def given_flags(args: argparse.Namespace) -> list[str]:
    """Those of ``add_planned``'s flags, and options for vLLM, that are not as by default."""
    parser = argparse.ArgumentParser()
    add_planned(parser)
    given = [
        action.option_strings[0]
        for action in parser._actions
        if hasattr(args, action.dest) and getattr(args, action.dest) != action.default
    ]
    return [*given, *(["what stands behind --"] if args.vllm else [])]


def add_inputs(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        action="extend",
        required=required,
        metavar="FILE",
        help="OpenAI batch lines, plain or compressed (.gz, .zst), or .parquet; several are one "
        "job; - is standard input",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    add_options(parser, RowLimits)


def limits_of(args: argparse.Namespace) -> RowLimits:
    return RowLimits(**settings_of(args, RowLimits))
