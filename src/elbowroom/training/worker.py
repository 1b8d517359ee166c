"""What every process that torchrun starts does, whatever plan it trains by: begin, and end."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch

from elbowroom.core.errors import ElbowroomError, InputError, PeerLostError
from elbowroom.core.files import check_writable
from elbowroom.training.ending import WATCH_SECONDS, end_with_parent, leave, leave_on_interrupt
from elbowroom.training.process_group import join_workers
from elbowroom.training.run_flags import add_common_flags


def worker_parser(
    module: str, about: str | None, add_flags: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """A parser of the common flags, and those of ``add_flags``, for ``python -m module``."""
    parser = argparse.ArgumentParser(prog=module, description=about)
    add_common_flags(parser)
    add_flags(parser)
    return parser


def worker_main(
    parser: argparse.ArgumentParser, train: Callable[[argparse.Namespace], None]
) -> int:
    """Train as the command line says; the exit code.

    A worker that fails says why, and ends at once.
    """
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        print(f"error: start it with torchrun --nproc-per-node N -m {parser.prog}", flush=True)
        return 2
    end_with_parent()
    leave_on_interrupt(is_told=os.environ["RANK"] == "0")
    try:
        train(args)
    except ElbowroomError as error:
        if isinstance(error, PeerLostError):
            time.sleep(2 * WATCH_SECONDS)  # what ended the peer may end us, too
        print(f"error (worker {os.environ['RANK']}): {error}", file=sys.stderr)
        leave(2 if isinstance(error, InputError) else 1)
    except Exception:
        traceback.print_exc()
        leave(1)
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Raise OutputError for files of a run that could not be written, one of each folder."""
    checkpoints = [args.checkpoints / "step"] if args.checkpoints else []
    check_writable([*checkpoints, *([args.trace] if args.trace else [])])


def join(args: argparse.Namespace) -> None:
    """Join the other workers, with as many threads as torchrun's environment says."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    join_workers(args.timeout)
