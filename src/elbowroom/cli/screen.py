"""The console of the commands."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    """One whose reader may leave: that is an error like others, and does not end the process."""

    def on_broken_pipe(self) -> None:
        """Raise what ``rich`` turns into an exit, which nothing that is optional could catch."""
        raise BrokenPipeError
