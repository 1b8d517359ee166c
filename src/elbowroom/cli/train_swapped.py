"""What ``train run`` does with a swap plan, and its flags for that."""

from __future__ import annotations

import argparse
from pathlib import Path

from elbowroom.cli.screen import Console
from elbowroom.core.files import check_writable
from elbowroom.plans.swap import read_swap_plan


def add_swap_flags(run: argparse.ArgumentParser) -> None:
    flags = run.add_argument_group("with a swap plan")
    flags.add_argument(
        "--enforce",
        action=argparse.BooleanOptionalAction,
        help="refuse an allocation beyond the budget (default: where memory can be metered)",
    )
    flags.add_argument(
        "--verify", action="store_true", help="compare checksums of what left and what came back"
    )
    flags.add_argument(
        "--picture", type=Path, help="write the last step's memory over time, as SVG"
    )


def run_swapped(args: argparse.Namespace, console: Console) -> int:
    checkpoint = args.checkpoints and args.checkpoints / "step"
    check_writable([path for path in (args.trace, args.picture, checkpoint) if path is not None])
    plan = read_swap_plan(args.plan)
    console.print(f"one process, by {args.plan}: {plan}", highlight=False, soft_wrap=True)
    # Loaded here: torch takes longer to load than most commands to run.
    from elbowroom.app.swap_training import SwapRunOptions, train_swapped
    from elbowroom.training.loop import LoopOptions, dtype_of

    train_swapped(
        args.script,
        plan,
        LoopOptions(args.steps, args.seed, args.lr, args.clip_norm, dtype_of(args.autocast)),
        SwapRunOptions(
            args.enforce,
            args.verify,
            args.tier,
            args.checkpoints,
            args.every,
            args.trace,
            args.picture,
        ),
        lambda line: print(line, flush=True),
    )
    return 0
