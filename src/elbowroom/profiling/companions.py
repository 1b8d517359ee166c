"""Processes that keep a machine as busy as training workers do, while one of them is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from elbowroom.core.errors import ElbowroomError

READY = b"sweeping\n"


class Companions:
    """While the block runs, ``count`` processes sweep through the model of a script.

    They end with it, and with this process: each watches its standard input. Raises ElbowroomError
    if one ends before.
    """

    def __init__(self, count: int, script: Path, seed: int, num_threads: int) -> None:
        self._command = (
            *(sys.executable, "-m", "elbowroom.profiling.companion"),
            *(str(script), str(seed), str(num_threads)),
        )
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        pipe = subprocess.PIPE
        try:
            for _ in range(self._count):
                self._processes.append(subprocess.Popen(self._command, stdin=pipe, stdout=pipe))
            for process in self._processes:
                assert process.stdout is not None
                if process.stdout.readline() != READY:
                    raise _ended(process.wait())
        except BaseException:
            self._end()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        codes = [process.poll() for process in self._processes]
        self._end()
        if error is None:
            for code in codes:
                if code is not None:
                    raise _ended(code)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def _ended(code: int) -> ElbowroomError:
    return ElbowroomError(
        f"a process that was to run beside the measured one ended with code {code}: see its output "
        "above, or measure alone with --workers 1"
    )
