"""A store in the memory of NVIDIA GPUs, whose buffers peers open by CUDA's IPC handles.

Buffers are taken from the driver, not from PyTorch's allocator: a handle names a whole allocation,
and an allocation in expandable segments has none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import runtime

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.core.units import format_bytes
from elbowroom.pool.run_dir import is_held
from elbowroom.pool.shared_memory import SharedMemoryStore, alive_path
from elbowroom.pool.store import check_size

_HANDLE_BYTES = 64


class CudaStore(SharedMemoryStore):
    """A store that keeps one rank's layers on ``device``, and their handles in ``run_dir``.

    When a rank dies, the driver keeps what peers have opened until they end, but nobody can open it
    again. The next process of that rank takes new memory for its layers.
    """

    def __init__(self, run_dir: Path, rank: int, device: torch.device) -> None:
        super().__init__(run_dir, rank)
        self._rank = rank
        self.device = device
        self._own: dict[int, torch.Tensor] = {}
        self.device_bytes = 0

    def allocate(self, layer: int, num_bytes: int) -> torch.Tensor:
        self._own[layer] = _allocate(num_bytes, self.device, f"layer {layer}")
        self.device_bytes += num_bytes
        return self._own[layer]

    def publish(self, layer: int) -> None:
        # A peer copies on streams of its own, which know nothing of ours: all must be written.
        torch.get_device_module(self.device).synchronize(self.device)
        _write_handle(self._part_path(layer), self._own[layer])
        super().publish(layer)

    def was_published(self, layer: int) -> bool:
        """Never: a handle is of no use when the process that made it has ended."""
        return False

    def mailbox(self, borrower: int, owner: int, num_bytes: int) -> torch.Tensor:
        """Open memory that lies on the borrower's device. See ``Store.mailbox``."""
        path = self._run_dir / f"mail-{borrower}-{owner}"
        if borrower != self._rank:
            return _open(path, self.device)
        buffer = _allocate(num_bytes, self.device, f"a mailbox for rank {owner}")
        self.device_bytes += num_bytes
        _write_handle(path, buffer)
        return buffer

    def close(self) -> None:
        self._own.clear()
        super().close()

    def _open_published(self, layer: int, owner: int, num_bytes: int) -> torch.Tensor:
        if not is_held(alive_path(self._run_dir, owner)):
            raise PeerLostError(f"rank {owner} died, and layer {layer} with it: see its log")
        return check_size(_open(self._path(layer), self.device), layer, owner, num_bytes)


class _DeviceMemory:
    """Device memory of ``num_bytes`` at ``address``, in the form that PyTorch makes tensors from.

    ``free`` gets the address when no tensor uses the memory any more.
    """

    def __init__(self, address: int, num_bytes: int, free: Any) -> None:
        self._address = address
        self._free = free
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }

    def __del__(self) -> None:
        self._free(self._address)


def _allocate(num_bytes: int, device: torch.device, what: str) -> torch.Tensor:
    """Take new device memory from the driver, as a uint8 vector.

    Raises PoolError, which names ``what`` needs it, when the device is full.
    """
    _check(runtime.cudaSetDevice(device.index or 0))
    error, address = runtime.cudaMalloc(num_bytes)
    if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
        free, _ = _check(runtime.cudaMemGetInfo())
        raise PoolError(
            f"{what} needs {format_bytes(num_bytes)} on {device}, {format_bytes(free)} is free: "
            f"lower --memory, or use --pool none"
        )
    _check((error,))
    return _tensor(_DeviceMemory(address, num_bytes, runtime.cudaFree), address)


def _write_handle(path: Path, buffer: torch.Tensor) -> None:
    """Write the IPC handle of ``buffer`` to a file, followed by its size in bytes as text."""
    (handle,) = _check(runtime.cudaIpcGetMemHandle(buffer.data_ptr()))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(bytes(handle.reserved) + str(buffer.numel()).encode())


def _open(path: Path, device: torch.device) -> torch.Tensor:
    """Open a peer's memory by the handle in a file, as a uint8 vector, readable and writable.

    Access is as fast as the link between the devices.
    """
    data = path.read_bytes()
    handle = runtime.cudaIpcMemHandle_t()
    handle.reserved = data[:_HANDLE_BYTES]
    _check(runtime.cudaSetDevice(device.index or 0))
    flags = runtime.cudaIpcMemLazyEnablePeerAccess
    (address,) = _check(runtime.cudaIpcOpenMemHandle(handle, flags))
    memory = _DeviceMemory(address, int(data[_HANDLE_BYTES:]), runtime.cudaIpcCloseMemHandle)
    return _tensor(memory, address)


def _tensor(memory: _DeviceMemory, address: int) -> torch.Tensor:
    """Make a uint8 vector of ``memory`` without a copy."""
    # It has to be on the device where the bytes are: on another, PyTorch would copy them.
    (attributes,) = _check(runtime.cudaPointerGetAttributes(address))
    return as_tensor(memory, torch.device("cuda", attributes.device))


def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
    """View memory that has ``__cuda_array_interface__`` as a tensor on ``device``.

    Tests without a GPU put another function here.
    """
    return torch.as_tensor(memory, device=device)


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Strip the error code from what a call of the CUDA runtime returned.

    Raises PoolError if the call failed.
    """
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise PoolError(f"CUDA refused to share memory between processes: {text.decode()}")
    return tuple(values)
