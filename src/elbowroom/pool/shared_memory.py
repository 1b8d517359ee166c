"""A store in the shared memory of one host, whose layers are mapped files in a run directory."""

from __future__ import annotations

import errno
import mmap
import os
import time
from pathlib import Path

import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.core.units import format_bytes
from elbowroom.pool.run_dir import hold_lock, is_held
from elbowroom.pool.store import check_size, not_published

_POLL_SECONDS = 0.01

GRACE_SECONDS = 30.0
"""Seconds that an owner that died may be away: whoever runs the group may start it again."""


class SharedMemoryStore:
    """A store of one rank of a group that meets in ``run_dir``, on one host.

    A layer is visible once its file has its final name. Rank r holds the lock of ``rank-r.lock``
    while it lives, so a peer that waits for a layer knows when its owner died. What a rank has
    published outlives it: the next process of that rank opens it again.
    """

    device = torch.device("cpu")
    device_bytes = 0

    def __init__(self, run_dir: Path, rank: int, grace_seconds: float = GRACE_SECONDS) -> None:
        self._run_dir = run_dir
        self._grace_seconds = grace_seconds
        self._alive = hold_lock(alive_path(run_dir, rank))

    def allocate(self, layer: int, num_bytes: int) -> torch.Tensor:
        path = self._part_path(layer)
        path.unlink(missing_ok=True)  # of a process of this rank that died
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserve the pages now: otherwise a full /dev/shm kills the process with SIGBUS later.
            os.posix_fallocate(descriptor, 0, num_bytes)
            return _map_file(descriptor, num_bytes)
        except OSError as error:
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            free = os.statvfs(self._run_dir)
            raise PoolError(
                f"layer {layer} needs {format_bytes(num_bytes)} of shared memory, "
                f"{format_bytes(free.f_bavail * free.f_frsize)} is free in {self._run_dir.parent}: "
                f"enlarge it (docker: --shm-size), or use --pool none"
            ) from error
        finally:
            os.close(descriptor)

    def publish(self, layer: int) -> None:
        self._part_path(layer).rename(self._path(layer))

    def was_published(self, layer: int) -> bool:
        return self._path(layer).exists()

    def open(self, layer: int, owner: int, num_bytes: int, timeout_seconds: float) -> torch.Tensor:
        path = self._path(layer)
        deadline = time.monotonic() + timeout_seconds
        last_seen = None  # an owner that has not been seen yet has all the time there is
        while not path.exists():
            now = time.monotonic()
            if is_held(alive_path(self._run_dir, owner)):
                last_seen = now
            is_lost = last_seen is not None and now - last_seen > self._grace_seconds
            if is_lost or not self._run_dir.exists():
                raise PeerLostError(
                    f"rank {owner} died before it published layer {layer}: see its log"
                )
            if now > deadline:
                raise not_published(layer, owner, timeout_seconds)
            time.sleep(_POLL_SECONDS)
        return self._open_published(layer, owner, num_bytes)

    def _open_published(self, layer: int, owner: int, num_bytes: int) -> torch.Tensor:
        descriptor = os.open(self._path(layer), os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A private mapping keeps PyTorch content, which wants writable memory, and makes a
            # stray write land in a copy of our own instead of in the owner's weights.
            size = os.fstat(descriptor).st_size
            buffer = _map_file(descriptor, size, mmap.MAP_PRIVATE)
        finally:
            os.close(descriptor)
        return check_size(buffer, layer, owner, num_bytes)

    def mailbox(self, borrower: int, owner: int, num_bytes: int) -> torch.Tensor:
        return shared_mailbox(self._run_dir, borrower, owner, num_bytes)

    def close(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def _path(self, layer: int) -> Path:
        return self._run_dir / f"layer-{layer:04d}"

    def _part_path(self, layer: int) -> Path:
        return self._path(layer).with_suffix(".part")


def shared_mailbox(run_dir: Path, borrower: int, owner: int, num_bytes: int) -> torch.Tensor:
    """Map a mailbox's file, uint8 [num_bytes], and create it if need be.

    It outlives borrower and owner, so that either may be started again.
    """
    path = run_dir / f"mail-{borrower}-{owner}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        return _map_file(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _map_file(descriptor: int, num_bytes: int, flags: int = mmap.MAP_SHARED) -> torch.Tensor:
    """Map the first bytes of a file as a uint8 vector, which outlives the descriptor."""
    mapping = mmap.mmap(descriptor, num_bytes, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def alive_path(run_dir: Path, rank: int) -> Path:
    """The path of the file that ``rank`` holds the lock of while it lives."""
    return run_dir / f"rank-{rank}.lock"
