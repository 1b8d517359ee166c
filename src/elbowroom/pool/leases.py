"""Leases on layers, one class for each place where a layer's weights can be.

A lease is the right to use a layer's weights until it is released. ``acquire`` gives the function
that runs the layer's feed-forward network meanwhile. Callers need not know whether the weights are
this replica's own, a peer's, or in a slot, or whether the rows travel to the weights instead.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.pool.layer import Forward, PooledLayer
from elbowroom.pool.shipping import Shipper
from elbowroom.pool.slots import Slot
from elbowroom.pool.stats import PoolStats
from elbowroom.pool.streamer import Streamer

LOST_SECONDS = 5.0
"""Seconds in which an owner that died is not asked again; its layers are read where they lie."""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""The sum of rows [rows, columns] over the tensor-parallel ranks of a replica, of equal shape."""


class Leases(ABC):
    """Leases on the layers of one residency. Not thread-safe: the thread that computes calls.

    A new residency overrides ``acquire``, and of the rest what it needs.
    """

    @abstractmethod
    def acquire(self, layer: int) -> Forward:
        """Take the lease on ``layer``: the forward returned may run until ``release``.

        Raises PoolError when the weights do not arrive; there is no lease to release then.
        """

    def release(self, layer: int) -> None:  # noqa: B027 (most residencies have nothing to do)
        """End the lease on ``layer``, also after its forward failed."""

    def begin_iteration(self) -> None:  # noqa: B027
        """Expect a forward pass that uses these leases."""

    def start(self) -> None:  # noqa: B027
        """Begin background work. Called once, after the whole group has been attached."""

    def before_graph(self) -> None:  # noqa: B027
        """Expect a whole pass to be captured in a graph, or such a graph to be replayed."""

    def after_capture(self) -> None:  # noqa: B027
        """End the capture of a pass, still within it."""

    def check_integrity(self) -> None:  # noqa: B027
        """Raise PoolError if open leases and what they stand for disagree."""

    def stats(self) -> PoolStats:
        """Counters of these leases alone; those of other residencies are 0."""
        return PoolStats()

    def close(self) -> None:  # noqa: B027
        """End background work, once no lease is open."""


class _BoundLeases(Leases):
    """Leases on weights that stay where they are: they are bound once, and leasing is free.

    ``buffers`` holds a layer's bytes (uint8) for each of ``layers``.
    """

    def __init__(
        self, layers: Mapping[int, PooledLayer], buffers: Mapping[int, torch.Tensor]
    ) -> None:
        self._forwards = {number: layer.forwards[0] for number, layer in layers.items()}
        self._num_bytes = sum(layer.manifest.data_bytes for layer in layers.values())
        for number, layer in layers.items():
            layer.bind(buffers[number])

    def acquire(self, layer: int) -> Forward:
        return self._forwards[layer]


class OwnedLeases(_BoundLeases):
    """Leases on layers that this replica keeps for its group."""

    def stats(self) -> PoolStats:
        return PoolStats(owned_bytes=self._num_bytes)


class MappedLeases(_BoundLeases):
    """Leases on peers' layers that are read where their owners keep them."""

    def stats(self) -> PoolStats:
        return PoolStats(mapped_bytes=self._num_bytes)


class SlottedLeases(Leases):
    """Leases on peers' layers that are streamed into slots, in ascending order of layers.

    A layer always comes into the same slot, to which its modules are bound once. The lease holds
    the slot: released, the streamer may fill it with a later layer. A pass that was cut short may
    be followed by one from the first layer on.
    """

    def __init__(self, layers: Mapping[int, PooledLayer], streamer: Streamer) -> None:
        self._forwards = {number: layer.forwards[0] for number, layer in layers.items()}
        self._streamer = streamer
        self._layers = sorted(layers)
        self._next = 0
        self._slot: Slot | None = None
        self._leased: int | None = None
        for number, layer in layers.items():
            layer.bind(streamer.buffer_of(number))
        self._num_iterations = 0
        self.wait_seconds = 0.0

    def acquire(self, layer: int) -> Forward:
        """Wait until ``layer`` is in its slot. See ``Leases.acquire``.

        Raises PoolError when the layer is not the next in order or does not arrive in time.
        """
        if layer != self._layers[self._next]:
            self._restart(layer)
        begin = time.perf_counter()
        slot = self._streamer.acquire(layer)
        self.wait_seconds += time.perf_counter() - begin
        self._next = (self._next + 1) % len(self._layers)
        self._slot, self._leased = slot, layer
        return self._forwards[layer]

    def release(self, layer: int) -> None:
        slot, self._slot, self._leased = self._slot, None, None
        assert slot is not None, "the pool releases only what it has acquired"
        self._streamer.release(slot)

    def begin_iteration(self) -> None:
        self._num_iterations += 1

    def pause(self) -> None:
        """Fetch nothing until ``resume``; then the first layer is the next."""
        self._next = 0
        self._streamer.pause()

    def resume(self) -> None:
        """Fetch again, from the first layer on."""
        self._streamer.resume()

    def start(self) -> None:
        self._streamer.start()

    def before_graph(self) -> None:
        if self._next:  # a pass was cut short, and a graph begins with the first layer
            self._streamer.restart()
            self._next = 0
        self._streamer.sync()
        self._num_iterations += 1

    def after_capture(self) -> None:
        self._streamer.join()
        self._num_iterations -= 2  # nothing ran: neither what it counted itself nor the line above

    def check_integrity(self) -> None:
        if self._slot is not None and self._slot.layer != self._leased:
            raise PoolError(
                f"layer {self._leased} is leased, but slot {self._slot.index} holds layer "
                f"{self._slot.layer}"
            )
        self._streamer.check_integrity()

    def stats(self) -> PoolStats:
        return PoolStats(
            slot_bytes=sum(buffer.numel() for buffer in self._streamer.buffers),
            streamed_bytes=self._streamer.streamed_bytes,
            streamed_iterations=self._num_iterations,
            wait_seconds=self.wait_seconds,
        )

    def close(self) -> None:
        self._streamer.close()

    def _restart(self, layer: int) -> None:
        """Begin the order again, after a pass that was cut short (by an exception, for instance).

        Raises PoolError unless ``layer`` is the first.
        """
        if layer != self._layers[0]:
            raise PoolError(
                f"layer {layer} asked for, layer {self._layers[self._next]} is next: "
                f"a streamed pool runs its layers in order"
            )
        self._streamer.restart()
        self._next = 0


class ShippedLeases(Leases):
    """Leases on peers' layers to whose owners the rows are shipped.

    A layer is read in place, from what the store ``opened``, where its owner died, whose weights
    stay, and where the module is given more than its rows, which stays here. ``reduce`` sums what
    comes back over tensor-parallel ranks, if the replica has several.
    """

    def __init__(
        self,
        layers: Mapping[int, PooledLayer],
        opened: Mapping[int, torch.Tensor],
        owners: Sequence[int],
        shipper: Shipper,
        reduce: Reduce | None = None,
    ) -> None:
        self._layers = layers
        self._opened = opened
        self._owners = owners
        self._shipper = shipper
        self._reduce = reduce
        self._forwards = {layer: partial(self._run, layer) for layer in layers}
        self._lost_until: dict[int, float] = {}
        self._num_iterations = self._num_rows = 0
        self.num_layers_shipped = 0
        self.wait_seconds = 0.0

    def acquire(self, layer: int) -> Forward:
        return self._forwards[layer]

    def begin_iteration(self) -> None:
        self._num_iterations += 1

    def stats(self) -> PoolStats:
        return PoolStats(
            shipped_iterations=self._num_iterations,
            shipped_rows=self._num_rows,
            wait_seconds=self.wait_seconds,
        )

    def close(self) -> None:
        self._shipper.close()

    def _run(self, layer: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = None if args or kwargs else self._ship(layer, x)
        if out is not None:
            return out
        pooled = self._layers[layer]
        with pooled.bound_to(self._opened[layer]):
            return pooled.forwards[0](x, *args, **kwargs)

    def _ship(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """Have the owner run ``layer`` on ``x`` [..., columns]; None if it died.

        Raises PoolError where it failed.
        """
        owner = self._owners[layer]
        begin = time.perf_counter()
        if begin < self._lost_until.get(owner, 0.0):
            return None
        rows = x.flatten(0, -2)
        try:
            out = self._shipper.wait(self._shipper.start(owner, layer, rows))
            if self._reduce is not None:
                out = self._reduce(out)
        except PeerLostError:
            self._lost_until[owner] = time.perf_counter() + LOST_SECONDS
            return None
        self.wait_seconds += time.perf_counter() - begin
        self.num_layers_shipped += 1
        self._num_rows += len(rows)
        return out.view(*x.shape[:-1], out.shape[-1])


class TimedLeases(Leases):
    """The leases of another residency with a clock around every forward that succeeds.

    Only ``acquire`` and ``release`` are passed on: whoever holds ``leases`` starts and closes them.
    """

    def __init__(self, leases: Leases, layers: Sequence[int]) -> None:
        self._leases = leases
        self._forwards = {layer: partial(self._run, layer) for layer in layers}
        self.num_layers_run = 0
        self.run_seconds = 0.0

    def acquire(self, layer: int) -> Forward:
        return self._forwards[layer]

    def _run(self, layer: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        begin = time.perf_counter()
        forward = self._leases.acquire(layer)
        try:
            out = forward(x, *args, **kwargs)
        finally:
            self._leases.release(layer)
        self.run_seconds += time.perf_counter() - begin
        self.num_layers_run += 1
        return out
