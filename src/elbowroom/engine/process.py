"""Facts about processes, and their ties to each other (Linux; elsewhere they do nothing)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed when the process that started us ends, however it ends."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


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
