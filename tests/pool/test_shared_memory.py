"""Shared memory between real processes, and the private directory in which they meet."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.pool import run_dir as run_dir_module
from elbowroom.pool.run_dir import run_directory, sweep
from elbowroom.pool.shared_memory import SharedMemoryStore
from tests.pool.member import pattern

ROOT = Path(__file__).parents[2]
NUM_BYTES = 10_000  # not a whole number of pages


@contextmanager
def _member(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has done what it was asked, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.member", *(str(arg) for arg in args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        assert line, "the member died"
        yield process, line
    finally:
        process.kill()
        process.communicate()


def _expected(layer: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(pattern(layer, NUM_BYTES)), dtype=torch.uint8)


def test_bytes_cross_processes(tmp_path: Path) -> None:
    store = SharedMemoryStore(tmp_path, 1)
    with _member("publish", tmp_path, 0, 3, NUM_BYTES) as (owner, _):
        buffer = store.open(3, 0, NUM_BYTES, 5)
        assert torch.equal(buffer, _expected(3))
        owner.kill()
        owner.wait()
        assert torch.equal(buffer, _expected(3)), "what is mapped outlives its owner"
    buffer[0] += 1  # a stray write stays in the reader
    again = store.open(3, 0, NUM_BYTES, 5)
    assert torch.equal(again, _expected(3))
    store.close()


def test_readers_share_the_pages_of_the_owner(tmp_path: Path) -> None:
    owner, reader = SharedMemoryStore(tmp_path, 0), SharedMemoryStore(tmp_path, 1)
    own = owner.allocate(0, NUM_BYTES)
    owner.publish(0)
    read = reader.open(0, 0, NUM_BYTES, 1)
    own.fill_(5)
    assert int(read.max()) == int(read.min()) == 5, "a reader holds a copy of its own"
    owner.close()
    reader.close()


def test_unpublished_layers_are_not_seen(tmp_path: Path) -> None:
    owner, reader = SharedMemoryStore(tmp_path, 0), SharedMemoryStore(tmp_path, 1)
    owner.allocate(0, 64)
    with pytest.raises(PeerLostError):
        reader.open(0, 0, 64, 0.05)
    owner.publish(0)
    assert reader.open(0, 0, 64, 0.05).numel() == 64
    owner.close()
    reader.close()


def test_a_peer_that_never_appears(tmp_path: Path) -> None:
    store = SharedMemoryStore(tmp_path, 1)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"rank 0 did not publish layer 2 within 0\.3 s"):
        store.open(2, 0, 64, 0.3)
    assert 0.3 <= time.monotonic() - start < 2
    store.close()


def test_an_owner_that_is_killed_before_it_publishes(tmp_path: Path) -> None:
    store = SharedMemoryStore(tmp_path, 1, grace_seconds=0.5)
    with _member("allocate", tmp_path, 0, 2, NUM_BYTES) as (owner, _):
        with pytest.raises(PeerLostError, match="did not publish"):
            store.open(2, 0, NUM_BYTES, 0.05)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -9 {owner.pid}"])
        start = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 0 died before it published layer 2"):
            store.open(2, 0, NUM_BYTES, 60)
        assert time.monotonic() - start < 5
        killer.wait()
    store.close()


def test_an_owner_that_comes_back_in_time(tmp_path: Path) -> None:
    """Killed with half a layer; a peer that waits sees only the layer of its next process."""
    found: list[torch.Tensor] = []
    store = SharedMemoryStore(tmp_path, 1, grace_seconds=20)
    waiting = threading.Thread(target=lambda: found.append(store.open(2, 0, NUM_BYTES, 30)))
    with _member("allocate", tmp_path, 0, 2, NUM_BYTES) as (owner, _):
        waiting.start()
        time.sleep(0.2)
        owner.kill()
        owner.wait()
        time.sleep(0.2)
        assert waiting.is_alive()
    with _member("publish", tmp_path, 0, 2, NUM_BYTES):
        waiting.join(20)
    assert bytes(found[0].numpy()) == pattern(2, NUM_BYTES)
    store.close()


def test_what_was_published_is_opened_again(tmp_path: Path) -> None:
    with _member("publish", tmp_path, 0, 2, NUM_BYTES) as (owner, _):
        inode = (tmp_path / "layer-0002").stat().st_ino
        peer = SharedMemoryStore(tmp_path, 1)
        theirs = peer.open(2, 0, NUM_BYTES, 5)
        owner.kill()
        owner.wait()
    store = SharedMemoryStore(tmp_path, 0)
    assert store.was_published(2)
    again = store.open(2, 0, NUM_BYTES, 0)
    assert again is not None
    assert bytes(again.numpy()) == bytes(theirs.numpy()) == pattern(2, NUM_BYTES)
    again[0] += 1  # a stray write stays with us
    assert bytes(theirs.numpy()) == pattern(2, NUM_BYTES)
    assert (tmp_path / "layer-0002").stat().st_ino == inode
    assert not store.was_published(3)
    with pytest.raises(PeerLostError, match="layer 2 of rank 0 has"):
        store.open(2, 0, NUM_BYTES * 2, 0)
    store.close()
    peer.close()


def test_peers_with_other_sizes_are_refused(tmp_path: Path) -> None:
    owner, reader = SharedMemoryStore(tmp_path, 0), SharedMemoryStore(tmp_path, 1)
    owner.allocate(0, 64)
    owner.publish(0)
    with pytest.raises(PeerLostError, match="layer 0 of rank 0 has 64 bytes, expected 128: "):
        reader.open(0, 0, 128, 1)
    owner.close()
    reader.close()


def test_full_shared_memory_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = SharedMemoryStore(tmp_path, 0)
    with pytest.raises(PoolError, match=r"layer 4 needs 1 MiB .* is free .*--shm-size"):
        store.allocate(4, 2**20)
    assert not list(tmp_path.glob("layer-*")), "a half layer was left"
    store.close()


def test_a_rank_cannot_be_taken_twice(tmp_path: Path) -> None:
    store = SharedMemoryStore(tmp_path, 0)
    with pytest.raises(BlockingIOError):
        SharedMemoryStore(tmp_path, 0)
    store.close()
    SharedMemoryStore(tmp_path, 0).close()


def test_files_are_private(tmp_path: Path) -> None:
    store = SharedMemoryStore(tmp_path, 0)
    store.allocate(0, 64)
    store.publish(0)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_run_directory_is_private_and_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), run_directory(tmp_path) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.parent == tmp_path
        (path / "layer-0000").write_bytes(b"x")
        raise RuntimeError("boom")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_swept_and_live_ones_are_not(tmp_path: Path) -> None:
    with (
        _member("run-dir", tmp_path) as (dead, dead_path),
        _member("run-dir", tmp_path) as (_, live_path),
    ):
        (Path(dead_path) / "layer-0000").write_bytes(b"x")
        assert sweep(tmp_path) == []
        dead.kill()
        dead.wait()
        with run_directory(tmp_path) as path:
            assert sorted(tmp_path.iterdir()) == sorted([Path(live_path), path])


def test_sweep_leaves_strangers_alone(tmp_path: Path) -> None:
    other = tmp_path / "elbowroom-strangers"
    other.mkdir()
    (other / "owner.lock").touch()
    link = tmp_path / f"elbowroom-{os.getuid()}-link"
    link.symlink_to(other)
    assert sweep(tmp_path) == []
    assert (other / "owner.lock").exists()


def test_sweep_does_not_mind_a_directory_that_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may end between the listing and the look."""
    gone = tmp_path / f"elbowroom-{os.getuid()}-gone"
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone]))
    assert sweep(tmp_path) == []


def test_a_run_that_starts_is_not_swept_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run starts, and sweeps, between the making of the directory and its lock."""
    hold_lock = run_dir_module.hold_lock

    def sweep_while_locking(path: Path) -> int:
        monkeypatch.setattr(run_dir_module, "hold_lock", hold_lock)
        path.touch(mode=0o600)
        sweep(tmp_path)
        return hold_lock(path)

    monkeypatch.setattr(run_dir_module, "hold_lock", sweep_while_locking)
    with run_directory(tmp_path) as path:
        assert path.is_dir()


def test_a_look_at_a_lock_does_not_hinder_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank starts at the very moment at which a waiting peer looks whether it lives."""
    path = tmp_path / "rank-0.lock"
    path.touch()
    flock = fcntl.flock
    locks: list[int] = []
    owner = threading.Thread(target=lambda: locks.append(run_dir_module.hold_lock(path)))

    def flock_while_owner_starts(descriptor: int, flags: int) -> None:
        flock(descriptor, flags)
        monkeypatch.setattr(fcntl, "flock", flock)
        owner.start()
        owner.join(0.1)

    monkeypatch.setattr(fcntl, "flock", flock_while_owner_starts)
    run_dir_module.is_held(path)
    owner.join(10)
    assert len(locks) == 1, "the rank could not start, because a peer was looking"
    os.close(locks[0])
