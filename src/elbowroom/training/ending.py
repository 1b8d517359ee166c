"""How a worker ends: with whoever started it, at once on Ctrl-C, and never by an abort.

Threads of gloo abort a process that ends in Python's way while they wait for a message. A worker
that stops early has nothing to put away: checkpoints are whole or not there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

STOPPED = 75
"""Exit code of a run that may be resumed, as of all commands."""

WATCH_SECONDS = 0.5
"""After so long a worker knows that its parent is gone."""


def leave(code: int) -> NoReturn:
    """End this process at once, with what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def end_with_parent() -> None:
    """Start a thread that ends this process soon after its parent, which may have been killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(STOPPED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def leave_on_interrupt(is_told: bool) -> None:
    """Have SIGINT end this process, with a line that says so where ``is_told``."""

    def stop(*_: object) -> None:
        if is_told:  # print may be what was interrupted
            os.write(2, b"stopped by SIGINT; with --checkpoints, the same command resumes\n")
        os._exit(STOPPED)

    signal.signal(signal.SIGINT, stop)
