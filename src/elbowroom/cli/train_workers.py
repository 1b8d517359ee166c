"""Training by several workers on this machine, which torchrun starts and watches."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from elbowroom.cli.exit_codes import EXIT_FAILURE
from elbowroom.cli.screen import Console
from elbowroom.cli.signals import heard
from elbowroom.core.flag_kinds import number
from elbowroom.training.run_flags import add_common_flags


def add_worker_flags(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--max-restarts",
        type=number,
        default=0,
        help="times that all workers start again after one dies (default 0); with --checkpoints",
    )


def run_workers(
    args: argparse.Namespace,
    module: str,
    num_workers: int,
    add_flags: Callable[[argparse.ArgumentParser], None],
    console: Console,
) -> int:
    """Run ``python -m module`` for each worker, with the common flags and those of ``add_flags``.

    Returns the exit code. Raises KeyboardInterrupt for a run that was stopped and can resume.
    """
    launcher = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_workers), "--max-restarts", str(args.max_restarts)),
        *("-m", module),
    )
    # torchrun sets the same number, with a banner.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # Of its own session: it would answer signals with a traceback. Workers end when it is gone.
    command = [*launcher, *_words(args, add_flags)]
    with interrupted(), subprocess.Popen(command, env=environment, start_new_session=True) as run:
        try:
            code = run.wait()
            reason = f"torchrun was stopped by {signal.Signals(-code).name}" if code < 0 else None
        except KeyboardInterrupt as stop:
            run.kill()
            reason = str(stop)
    if reason is None:
        return code
    return stopped(args, reason, console)


def stopped(args: argparse.Namespace, reason: str, console: Console) -> int:
    """Exit code of a run that was stopped. Raises KeyboardInterrupt for one that can resume."""
    if args.checkpoints:
        raise KeyboardInterrupt(reason)
    console.print(f"elbowroom: {reason}; without --checkpoints, nothing is kept")
    return EXIT_FAILURE


@contextmanager
def interrupted() -> Iterator[None]:
    """Have each signal that stops what runs interrupt it, and say which it was."""
    before = {one: signal.signal(one, _interrupt) for one in heard()}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def _words(
    args: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], None]
) -> list[str]:
    """What the command line said for a worker's flags, as words again."""
    parser = argparse.ArgumentParser(add_help=False)
    add_common_flags(parser)
    add_flags(parser)
    words = [str(args.script)]
    for action in parser._actions:
        value = getattr(args, action.dest)
        if not action.option_strings or value == action.default:
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:  # a flag that is alone
            words.append(str(value))
    return words
