"""Background load: processes that keep a machine as busy as training workers do.

They run while one process is measured.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elbowroom.core.errors import MeasuringError
from elbowroom.profiling.child_log import child_log

READY = b"sweeping\n"


@contextmanager
def background_load(count: int, script: Path, seed: int, num_threads: int) -> Iterator[None]:
    """Let ``count`` processes sweep through the model of a script while the block runs.

    They end with the block, and with this process: each watches its standard input. Raises
    MeasuringError if one ends earlier.
    """
    command = (
        *(sys.executable, "-m", "elbowroom.profiling.background_worker"),
        *(str(script), str(seed), str(num_threads)),
    )
    pipe = subprocess.PIPE
    processes: list[subprocess.Popen[bytes]] = []
    with child_log("background_worker") as log:
        try:
            for _ in range(count):
                processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log))
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


def _ended(code: int) -> MeasuringError:
    return MeasuringError(
        f"a process that was to run beside the measured one ended with code {code}: mend the "
        f"script, or measure alone with --workers 1"
    )
