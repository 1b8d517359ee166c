"""The console of the commands."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO

import rich.console


class Console(rich.console.Console):
    """One whose reader may leave: that is an error like others, and does not end the process."""

    def on_broken_pipe(self) -> None:
        """Raise what ``rich`` turns into an exit, which nothing that is optional could catch."""
        discard_rest(self.file)
        raise BrokenPipeError

    def say(self, text: str) -> None:
        """Print a line as it is: no markup, as names may have brackets, no colours, no folding."""
        self.print(text, highlight=False, markup=False, soft_wrap=True)


def discard_rest(stream: IO[str]) -> None:
    """Send what ``stream`` still holds nowhere: its reader is gone.

    Python flushes at its end, and its exit code would be 120 instead of the command's.
    """
    with suppress(OSError, ValueError):  # a stream of no file needs nothing
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
