"""A private directory in which the processes of one run meet.

It lies in shared memory where there is any, so weights published as files in it are memory. Its
creator holds a lock on it for as long as it lives; a directory whose lock is free belongs to
nobody any more, and the next start sweeps it away, also after ``kill -9``.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elbowroom.core import host
from elbowroom.core.errors import PoolError
from elbowroom.core.units import format_bytes

_PREFIX = "elbowroom-"
_LOCK = "owner.lock"
_LOCK_SECONDS = 1.0  # a peer that looks holds the lock for a moment


def default_root(num_bytes: int = 0, say: Callable[[str], None] = lambda _: None) -> Path:
    """Find shared memory with ``num_bytes`` free, or else the temporary directory.

    Files in the temporary directory are mapped just as well, through the page cache; the system
    may write them to disk, and ``say`` is told so. Raises PoolError where neither has the room.
    """
    memory, temporary = host.shared_memory_folder(), host.temporary_folder()
    if memory is not None and host.free_bytes(memory) >= num_bytes:
        return memory
    rooms = ", ".join(
        f"{folder} has {format_bytes(host.free_bytes(folder))}"
        for folder in (memory, temporary)
        if folder is not None
    )
    if num_bytes and host.free_bytes(temporary) < num_bytes:
        raise PoolError(
            f"the pool needs {format_bytes(num_bytes)} of files in memory, and {rooms}: enlarge "
            f"it (docker run --shm-size), set TMPDIR to a larger folder, or use --pool none"
        )
    if num_bytes:
        say(
            f"the pool lies in {temporary}: it needs {format_bytes(num_bytes)}, and {rooms} "
            f"(docker run --shm-size enlarges /dev/shm)"
        )
    return temporary


@contextmanager
def run_directory(
    root: Path | None = None, num_bytes: int = 0, say: Callable[[str], None] = lambda _: None
) -> Iterator[Path]:
    """Make a directory, mode 0700, that is removed at exit; sweep what dead runs left.

    It lies in ``root``, or else where ``default_root`` finds room for ``num_bytes``, which may
    raise PoolError.
    """
    root = root or default_root(num_bytes, say)
    sweep(root)
    # Takes its name once it is locked: before, another start could sweep it away.
    hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}{host.user_id()}-", dir=root))
    lock = hold_lock(hidden / _LOCK)
    path = hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(root: Path) -> list[Path]:
    """Remove this user's run directories in ``root`` whose creator is gone, and return them."""
    removed = []
    for path in root.glob(f"{_PREFIX}{host.user_id()}-*"):
        lock = path / _LOCK
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # its run ended meanwhile
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != host.user_id():
            continue
        if lock.exists() and not is_held(lock):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def hold_lock(path: Path) -> int:
    """Create ``path`` and lock it until the returned descriptor is closed or the process ends.

    Raises BlockingIOError when another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    while not host.try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
        time.sleep(0.01)
    return descriptor


def is_held(path: Path) -> bool:
    """Tell whether a live process holds the lock of ``path``. False when it does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not host.try_lock(descriptor, shared=True)  # shared: lookers see no lookers
    finally:
        os.close(descriptor)
