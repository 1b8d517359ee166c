"""Stores, in which owners publish weights and peers open them; one within a process for tests."""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from elbowroom.core.errors import PeerLostError


class Store(Protocol):
    """One rank's view of the layers that its group shares.

    Buffers are uint8 vectors, one for each layer, readable by peers once published. An owner runs
    no code for its readers: copies out of an opened buffer are one-sided.
    """

    device: torch.device
    """The device that this rank computes on, and that its buffers and slots lie on."""

    @property
    def device_bytes(self) -> int:
        """Memory that this rank's store has taken from its device, where PyTorch does not count it.

        0 on a host.
        """
        ...

    def allocate(self, layer: int, num_bytes: int) -> torch.Tensor:
        """Make a buffer for an owned layer, private until published.

        Raises PoolError when there is not enough memory.
        """
        ...

    def publish(self, layer: int) -> None:
        """Make an owned layer visible to peers. Its bytes must not change afterwards."""
        ...

    def was_published(self, layer: int) -> bool:
        """Whether an earlier process of this rank has published an owned layer."""
        ...

    def open(self, layer: int, owner: int, num_bytes: int, timeout_seconds: float) -> torch.Tensor:
        """Open a published layer, which is only to be read; wait until it is there.

        It can be read as long as it is open, also when the peer has died.

        Raises PeerLostError when the owner died and did not come back, did not publish in time, or
        published another number of bytes.
        """
        ...

    def mailbox(self, borrower: int, owner: int, num_bytes: int) -> torch.Tensor:
        """Open memory that a borrower and an owner both write and read. The borrower asks first."""
        ...

    def close(self) -> None:
        """Let go of everything. Buffers handed out stay valid while they are referenced."""
        ...


class LocalHub:
    """The memory that several ``LocalStore`` share, as processes share their host's."""

    def __init__(self) -> None:
        self.published: dict[int, torch.Tensor] = {}
        self.mailboxes: dict[tuple[int, int], torch.Tensor] = {}
        self.changed = threading.Condition()


class LocalStore:
    """A store within one process; ranks whose stores have the same hub are peers."""

    device = torch.device("cpu")
    device_bytes = 0

    def __init__(self, hub: LocalHub | None = None) -> None:
        self._hub = hub or LocalHub()
        self._own: dict[int, torch.Tensor] = {}

    def allocate(self, layer: int, num_bytes: int) -> torch.Tensor:
        self._own[layer] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._own[layer]

    def publish(self, layer: int) -> None:
        with self._hub.changed:
            self._hub.published[layer] = self._own[layer]
            self._hub.changed.notify_all()

    def was_published(self, layer: int) -> bool:
        with self._hub.changed:
            return layer in self._hub.published

    def open(self, layer: int, owner: int, num_bytes: int, timeout_seconds: float) -> torch.Tensor:
        with self._hub.changed:
            if not self._hub.changed.wait_for(
                lambda: layer in self._hub.published, timeout_seconds
            ):
                raise not_published(layer, owner, timeout_seconds)
            return check_size(self._hub.published[layer], layer, owner, num_bytes)

    def mailbox(self, borrower: int, owner: int, num_bytes: int) -> torch.Tensor:
        with self._hub.changed:
            return self._hub.mailboxes.setdefault(
                (borrower, owner), torch.zeros(num_bytes, dtype=torch.uint8)
            )

    def close(self) -> None:
        self._own.clear()


def tensor_in(
    buffer: torch.Tensor, offset_bytes: int, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """View a part of ``buffer`` (uint8) as a tensor, without a copy."""
    end = offset_bytes + shape.numel() * dtype.itemsize
    return buffer[offset_bytes:end].view(dtype).view(shape)


def not_published(layer: int, owner: int, timeout_seconds: float) -> PeerLostError:
    """The error of a layer that its owner did not publish in time."""
    return PeerLostError(
        f"rank {owner} did not publish layer {layer} within {timeout_seconds:g} s: "
        f"see its log; a slow disk or too little memory may be the cause"
    )


def check_size(buffer: torch.Tensor, layer: int, owner: int, num_bytes: int) -> torch.Tensor:
    """Return ``buffer`` if it has ``num_bytes`` bytes.

    Raises PeerLostError if not: peers that load different models end here.
    """
    if buffer.numel() != num_bytes:
        raise PeerLostError(
            f"layer {layer} of rank {owner} has {buffer.numel()} bytes, expected {num_bytes}: "
            f"all replicas must load the same model with the same dtype"
        )
    return buffer
