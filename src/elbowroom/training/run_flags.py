"""Flags that every training run has, whatever plan it follows. Without torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from elbowroom.core.flag_kinds import count, positive

AUTOCAST = ("bf16",)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("script", type=Path, help="make_model(), make_batch(generator), loss_fn()")
    parser.add_argument(
        "--plan",
        type=Path,
        required=True,
        help="of train plan-pipeline, plan-swap or plan-grid, by --json",
    )
    parser.add_argument("--steps", type=count, required=True, help="minibatches")
    parser.add_argument(
        "--lr", type=positive, help="rate of AdamW, if the script has no make_optimizer"
    )
    parser.add_argument("--clip-norm", type=positive, help="limit on the norm of all gradients")
    parser.add_argument("--autocast", choices=AUTOCAST, help="compute in this type where it does")
    parser.add_argument(
        "--seed", type=int, default=0, help="for weights, data and dropout (default 0)"
    )
    parser.add_argument("--trace", type=Path, help="write what was done and when, for Perfetto")
    parser.add_argument("--checkpoints", type=Path, help="folder; a run resumes from the newest")
    parser.add_argument(
        "--every", type=count, default=100, help="minibatches to a checkpoint (default 100)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=300.0, help="seconds to wait for a peer (default 300)"
    )
