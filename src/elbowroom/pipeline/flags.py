"""Flags of a run in a pipeline, for torchrun's entry and for ``elbowroom train run``."""

from __future__ import annotations

import argparse
from pathlib import Path

from elbowroom.core.flag_kinds import count
from elbowroom.plans.pipeline import SEMANTICS


def add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("with a pipeline plan")
    flags.add_argument(
        "--semantics",
        choices=SEMANTICS,
        help="which weights a minibatch uses (default: the plan's)",
    )
    flags.add_argument(
        "--microbatches", type=count, default=1, help="with --semantics flush (default 1)"
    )
    flags.add_argument(
        "--tier",
        type=Path,
        help="folder for what a pipeline or swap plan swaps (default: the plan's, or for "
        "temporary files)",
    )
