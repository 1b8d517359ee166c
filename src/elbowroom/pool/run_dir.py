"""The private directory in which the processes of one run meet.

It lies in shared memory where there is any, so weights published as files in it are memory. Its
creator holds a lock on it for as long as it lives; a directory whose lock is free belongs to
nobody any more, and the next start sweeps it away, also after ``kill -9``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "elbowroom-"
_LOCK = "owner.lock"
_LOCK_SECONDS = 1.0  # a peer that looks holds the lock for a moment


def default_root() -> Path:
    """Shared memory of this host, or the temporary directory where there is none."""
    shared_memory = Path("/dev/shm")
    return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())


@contextmanager
def run_directory(root: Path | None = None) -> Iterator[Path]:
    """A new directory, mode 0700, removed at exit. Leftovers of dead runs are swept first."""
    root = root or default_root()
    sweep(root)
    # Takes its name once it is locked: before, another start could sweep it away.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}{os.getuid()}-", dir=root))
    lock = hold_lock(hidden / _LOCK)
    path = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(root: Path) -> list[Path]:
    """Remove this user's run directories whose creator is gone. Returns what was removed."""
    removed = []
    for path in root.glob(f"{_PREFIX}{os.getuid()}-*"):
        lock = path / _LOCK
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # its run ended meanwhile
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            continue
        if lock.exists() and not is_held(lock):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def hold_lock(path: Path) -> int:
    """Create ``path`` and hold its lock until the returned descriptor is closed or we die.

    Raises BlockingIOError when another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.01)


def is_held(path: Path) -> bool:
    """Whether some live process holds the lock of ``path``. False when it does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: lookers see no lookers
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
