"""Processes that keep a machine as busy as training workers do, while one of them is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elbowroom.core.errors import ElbowroomError

READY = b"sweeping\n"


@contextmanager
def companions(count: int, script: Path, seed: int, num_threads: int) -> Iterator[None]:
    """While the block runs, ``count`` processes sweep through the model of a script.

    They end with it, and with this process: each watches its standard input. Raises ElbowroomError
    if one ends before.
    """
    command = (
        *(sys.executable, "-m", "elbowroom.profiling.companion"),
        *(str(script), str(seed), str(num_threads)),
    )
    pipe = subprocess.PIPE
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe))
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != READY:
                raise _ended(process.wait())
        yield
        for process in processes:
            if (code := process.poll()) is not None:
                raise _ended(code)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _ended(code: int) -> ElbowroomError:
    return ElbowroomError(
        f"a process that was to run beside the measured one ended with code {code}: see its output "
        "above, or measure alone with --workers 1"
    )
