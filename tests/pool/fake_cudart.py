"""A stand-in for ``cuda.bindings.runtime``, whose device is a folder.

An allocation is a file of the folder, mapped by the process that made it and by those that opened
its handle, and it uses the device's memory until all of them have let go of it or ended. Who holds
what is told by locks, which the system takes from a process that is killed. As on a GPU:

- a handle is 64 bytes. It cannot be opened by the process that made it, nor when that has ended;
- what was opened stays as it was after its owner's end;
- memory that was freed or closed is unmapped: who reads it dies.

Freeing memory that others have open, which CUDA leaves undefined, is an error here.
"""

# ruff: noqa: N801, N802, N815 (CUDA's names)
from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

_HANDLE_BYTES = 64


class cudaError_t(Enum):
    """The errors that these calls give, with CUDA's numbers."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorDeviceUninitialized = 201


OK = cudaError_t.cudaSuccess


@dataclass
class cudaIpcMemHandle_t:
    """A handle: 64 bytes that name a file."""

    reserved: bytes = bytes(_HANDLE_BYTES)


@dataclass
class _Allocation:
    """Memory that this process has mapped, and locks that say so; ``uses`` counts its opens."""

    name: str
    mapping: mmap.mmap
    locks: list[int]
    is_own: bool
    uses: int = 1

    def release(self) -> None:
        self.mapping.close()
        for lock in self.locks:
            os.close(lock)


@dataclass
class FakeRuntime:
    """The runtime of one process on the device in ``folder``, which has ``total_bytes``.

    Several of them in one process are as good as several processes.
    """

    folder: Path
    total_bytes: int = 1 << 28
    cudaError_t = cudaError_t
    cudaIpcMemHandle_t = cudaIpcMemHandle_t
    cudaIpcMemLazyEnablePeerAccess = 1

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._allocations: dict[int, _Allocation] = {}

    def cudaSetDevice(self, device: int) -> tuple[cudaError_t]:
        return (OK if device == 0 else cudaError_t.cudaErrorInvalidDevice,)

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        with self._locked():
            return OK, self.total_bytes - self._used_bytes(), self.total_bytes

    def cudaMalloc(self, num_bytes: int) -> tuple[cudaError_t, int]:
        with self._locked():
            if num_bytes > self.total_bytes - self._used_bytes():
                return cudaError_t.cudaErrorMemoryAllocation, 0
            name = f"memory-{os.getpid()}-{os.urandom(8).hex()}"
            path = self.folder / name
            path.write_bytes(b"")
            os.truncate(path, num_bytes)
            locks = [_hold(path, fcntl.LOCK_SH), _hold(_owner_lock(path), fcntl.LOCK_EX)]
            return OK, self._map(_Allocation(name, _map(path), locks, is_own=True))

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        allocation = self._allocations.get(address)
        if allocation is None or not allocation.is_own:
            return (cudaError_t.cudaErrorInvalidValue,)
        with self._locked():
            own = allocation.locks[0]
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # opened by others
                fcntl.flock(own, fcntl.LOCK_SH)
                return (cudaError_t.cudaErrorInvalidValue,)
            self._allocations.pop(address).release()
        return (OK,)

    def cudaIpcGetMemHandle(self, address: int) -> tuple[cudaError_t, cudaIpcMemHandle_t | None]:
        allocation = self._allocations.get(address)
        if allocation is None:
            return cudaError_t.cudaErrorInvalidValue, None
        return OK, cudaIpcMemHandle_t(allocation.name.encode().ljust(_HANDLE_BYTES, b"\0"))

    def cudaIpcOpenMemHandle(
        self, handle: cudaIpcMemHandle_t, flags: int
    ) -> tuple[cudaError_t, int]:
        assert flags == self.cudaIpcMemLazyEnablePeerAccess
        name = bytes(handle.reserved).rstrip(b"\0").decode()
        path = self.folder / name
        for address, allocation in self._allocations.items():
            if allocation.name == name:
                if allocation.is_own:
                    return cudaError_t.cudaErrorDeviceUninitialized, 0
                allocation.uses += 1
                return OK, address
        with self._locked():
            if not name or not path.exists() or not _is_held(_owner_lock(path)):
                return cudaError_t.cudaErrorInvalidValue, 0
            locks = [_hold(path, fcntl.LOCK_SH)]
            return OK, self._map(_Allocation(name, _map(path), locks, is_own=False))

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[cudaError_t]:
        allocation = self._allocations.get(address)
        if allocation is None or allocation.is_own:
            return (cudaError_t.cudaErrorInvalidValue,)
        allocation.uses -= 1
        if not allocation.uses:
            self._allocations.pop(address).release()
        return (OK,)

    def cudaPointerGetAttributes(self, address: int) -> tuple[cudaError_t, SimpleNamespace | None]:
        if address not in self._allocations:
            return cudaError_t.cudaErrorInvalidValue, None
        return OK, SimpleNamespace(device=0)

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return OK, error.name.encode()

    def end(self) -> None:
        """Let go of all memory, as a process does that ends; tensors of it are not to be used."""
        for address in list(self._allocations):
            self._allocations.pop(address).release()

    def _map(self, allocation: _Allocation) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(allocation.mapping))
        self._allocations[address] = allocation
        return address

    def _used_bytes(self) -> int:
        """Bytes of all files that anybody holds. Files that nobody holds any more are removed."""
        used = 0
        for lock in self.folder.glob("*.lock"):
            path = lock.with_suffix("")
            if _is_held(path):
                used += path.stat().st_size
            else:
                path.unlink()
                lock.unlink()
        return used

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from the device, so that files and locks agree."""
        lock = _hold(self.folder / "device", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)


def fake_folder(run_dir: Path) -> Path:
    """The folder of the device on which the group of ``run_dir`` is."""
    return run_dir / "fake-gpu"


def load_store(runtime: FakeRuntime) -> Any:
    """Give ``elbowroom.pool.cuda`` as a process has it whose CUDA runtime is ``runtime``."""
    spec = importlib.util.find_spec("elbowroom.pool.cuda")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"cuda": ModuleType("cuda"), "cuda.bindings": bindings}):
        spec.loader.exec_module(module)
    module.as_tensor = _tensor_on_cpu  # type: ignore[attr-defined]
    return module


def _tensor_on_cpu(memory: Any, device: torch.device) -> torch.Tensor:
    """View memory of the fake device as a tensor, which keeps ``memory``."""
    assert device == torch.device("cuda", 0)
    interface = memory.__cuda_array_interface__
    (num_bytes,), (address, _) = interface["shape"], interface["data"]
    array = (ctypes.c_uint8 * num_bytes).from_address(address)
    array.memory = memory  # type: ignore[attr-defined]
    return torch.frombuffer(array, dtype=torch.uint8)


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _owner_lock(path: Path) -> Path:
    return path.with_suffix(".lock")


def _hold(path: Path, kind: int) -> int:
    """Lock a file until the descriptor is closed or the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, kind)
    return descriptor


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
