"""The processes of a replica: children that end with it, and the memory that it holds."""

from __future__ import annotations

import ctypes
import os
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from elbowroom.core import host


def tie_children() -> None:
    """Have every process that ``multiprocessing`` spawns from here end with us.

    From its first instruction: an engine core imports for seconds, and then waits for its parent.
    """
    original = spawn.get_command_line

    def get_command_line(**options: Any) -> list[str]:
        command = list(original(**options))
        code = command.index("-c") + 1
        tie = f"from {host.__name__} import die_with_parent; die_with_parent({os.getpid()})"
        command[code] = f"{tie}; {command[code]}"
        return command

    spawn.get_command_line = get_command_line


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, so that it is not counted as held.

    Loading leaves holes of many megabytes. Allocators without ``malloc_trim`` do as they like.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Anonymous and shared memory of this process, shared pages divided among their users (PSS).

    File-backed pages (libraries) are left out: they come and go with imports. 0 where the kernel
    does not tell.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return 1024 * (kib.get("Pss_Anon:", 0) + kib.get("Pss_Shmem:", 0))
