"""Flags of a training run, for torchrun's entry and for ``elbowroom train run``. Without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from elbowroom.core.flag_kinds import count, positive
from elbowroom.plans.pipeline import SEMANTICS

AUTOCAST = ("bf16",)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, help="make_model(), make_batch(generator), loss_fn()")
    parser.add_argument(
        "--plan", type=Path, required=True, help="of train plan-pipeline or plan-swap, by --json"
    )
    parser.add_argument("--steps", type=count, required=True, help="minibatches")
    parser.add_argument(
        "--semantics",
        choices=SEMANTICS,
        help="which weights a minibatch uses (default: the plan's)",
    )
    parser.add_argument(
        "--microbatches", type=count, default=1, help="with --semantics flush (default 1)"
    )
    parser.add_argument(
        "--lr", type=positive, help="rate of AdamW, if the script has no make_optimizer"
    )
    parser.add_argument(
        "--clip-norm", type=positive, help="limit on the gradient norm over all stages"
    )
    parser.add_argument("--autocast", choices=AUTOCAST, help="compute in this type where it does")
    parser.add_argument(
        "--seed", type=int, default=0, help="for weights, data and dropout (default 0)"
    )
    parser.add_argument("--trace", type=Path, help="write what was done and when, for Perfetto")
    parser.add_argument(
        "--tier",
        type=Path,
        help="folder for what the plan swaps (default: the plan's, or for temporary files)",
    )
    parser.add_argument("--checkpoints", type=Path, help="folder; a run resumes from the newest")
    parser.add_argument(
        "--every", type=count, default=100, help="minibatches to a checkpoint (default 100)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=300.0, help="seconds to wait for a peer (default 300)"
    )
