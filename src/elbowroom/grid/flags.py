"""Flags of a run on a grid, for torchrun's entry and for ``elbowroom train run``. Without torch."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

LossPlace = Literal["batch", "space", "whole"]
"""Where a loss is taken: of each worker's samples; of its samples and rows; of all on each."""


def add_grid_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("with a grid plan")
    flags.add_argument(
        "--loss",
        choices=get_args(LossPlace),
        default="batch",
        help="where loss_fn is called: with the outputs of a worker's own samples (default), for a "
        "mean over samples; with its own samples and rows, for a mean over both; or with the whole",
    )
    flags.add_argument(
        "--exact-randomness",
        action="store_true",
        help="dropout draws the same numbers on every grid (default: each worker draws its own)",
    )
