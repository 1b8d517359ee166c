"""The console of the commands."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO

import rich.console
from rich.table import Table


class Console(rich.console.Console):
    """One whose reader may leave: that is an error like others, and does not end the process."""

    def on_broken_pipe(self) -> None:
        """Raise what ``rich`` turns into an exit, which nothing that is optional could catch."""
        discard_rest(self.file)
        raise BrokenPipeError

    def say(self, text: str) -> None:
        """Print a line as it is: no markup, as names may have brackets, no colours, no folding."""
        self.print(text, highlight=False, markup=False, soft_wrap=True)

    def width_of(self, least: int) -> int:
        """Characters of a line: a terminal's, or ``least`` at least of what is none."""
        return self.width if self.is_terminal else max(self.width, least)

    def print_rows(
        self,
        columns: Sequence[str],
        rows: Iterable[Mapping[str, str]],
        width: int,
        *,
        texts: Collection[str],
        wraps: str,
        cut: Collection[str],
    ) -> None:
        """Print a table of some columns of rows, as they are, within ``width`` characters.

        Columns of ``texts`` begin at the left, others end at the right. Only ``wraps`` may be made
        narrower where there is no room. Cells of ``cut`` then end in dots, others are folded.
        """
        table = Table(box=None, padding=(0, 1, 0, 0))
        for name in columns:
            table.add_column(
                name,
                justify="left" if name in texts else "right",
                no_wrap=name != wraps,
                overflow="ellipsis" if name in cut else "fold",
            )
        for row in rows:
            table.add_row(*(row[name] for name in columns))
        before, self.width = self.width, width
        self.print(table, markup=False, highlight=False)
        self.width = before


def discard_rest(stream: IO[str]) -> None:
    """Send what ``stream`` still holds nowhere: its reader is gone.

    Python flushes at its end, and its exit code would be 120 instead of the command's.
    """
    with suppress(OSError, ValueError):  # a stream of no file needs nothing
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
