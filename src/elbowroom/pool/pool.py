"""The pool of one replica, which runs in place of the feed-forward modules of its model.

``loading.PoolLoader`` makes it, once the weights are there. Then: ``start``, forward passes,
``close``. The forward passes need no change: each feed-forward module's ``forward`` is
``Pool.run``, which takes the lease on the module's weights, runs the original and gives the lease
back.
"""

from __future__ import annotations

from typing import Any

import torch

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.choice import LeaseChoice
from elbowroom.pool.layer import Forward
from elbowroom.pool.leases import Leases
from elbowroom.pool.serving import ShipServer
from elbowroom.pool.stats import PoolStats
from elbowroom.pool.store import Store


class Pool:
    """One replica's view of the pool that its group shares. Not thread-safe: one thread computes.

    Args:
        share: what the plan says of this replica.
        store: where its layers are published; closed with the pool.
        choice: by which leases each layer is used, in every iteration.
        server: runs this replica's layers for peers that ship rows, if they may.
        first_layer: the first layer of a pass that the pool holds something of.

    """

    def __init__(
        self,
        share: PoolShare,
        store: Store,
        choice: LeaseChoice,
        server: ShipServer | None,
        first_layer: int = 0,
    ) -> None:
        self.share = share
        self._store = store
        self._choice = choice
        self._server = server
        self._first_layer = first_layer
        self._leased: int | None = None
        self._lessor: Leases | None = None  # of the layer leased: the next choice may be another
        self._is_closed = False

    def start(self) -> None:
        """Begin to stream and to serve: from here on slots fill ahead of compute."""
        for residency in self._choice.residencies:
            residency.start()
        if self._server is not None:
            self._server.start()

    def run(self, layer: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a layer's feed-forward network on ``x`` [..., columns].

        The first layer begins an iteration. What is passed beside ``x`` goes to the module's own
        forward. Where modules are run in turns, what peers wait for is run after it.
        Raises PoolError, and what the module raises.
        """
        if layer == self._first_layer:
            self._choice.begin_iteration(x)
        server = self._server
        if server is None or server.turns is None:
            return self.run_last(layer, self.acquire(layer), x, *args, **kwargs)
        with server.turns.forward_pass():  # of this layer alone, unless the engine has begun one
            with server.turns.pause():  # weights may have to be waited for
                forward = self.acquire(layer)
            out = self.run_last(layer, forward, x, *args, **kwargs)
            server.serve_waiting()
        return out

    def run_first(self, layer: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the first of several modules of a layer. The lease is open until ``run_last``."""
        if layer == self._first_layer:
            if self._leased is not None:  # a pass was cut short between two modules
                self.release(self._leased)
            self._choice.begin_iteration(x)
        return self.acquire(layer)(x, *args, **kwargs)

    def run_last(
        self, layer: int, forward: Forward, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run ``forward``, of the last or only module of a layer, and end the lease on it."""
        try:
            return forward(x, *args, **kwargs)
        finally:
            self.release(layer)

    def acquire(self, layer: int) -> Forward:
        """Take the lease on a layer: the forward returned is usable until ``release``.

        Raises PoolError when another lease is open, when streamed layers are asked for out of
        order, or when the layer does not arrive in time.
        """
        if self._leased is not None:
            raise PoolError(f"layer {layer} asked for while layer {self._leased} is leased")
        lessor = self._choice.leases[layer]
        forward = lessor.acquire(layer)
        self._leased, self._lessor = layer, lessor
        return forward

    def release(self, layer: int) -> None:
        """End the lease on a layer. Its slot, if it has one, is free for the next.

        Raises PoolError when the lease that is open, if any, is on another layer.
        """
        if self._leased != layer or self._lessor is None:
            raise PoolError(f"layer {layer} released, but {self._leased} is leased")
        self._leased = None
        self._lessor.release(layer)

    def before_graph(self) -> None:
        """Expect a whole forward pass to be captured in a graph, or such a graph to be replayed."""
        for residency in self._choice.residencies:
            residency.before_graph()

    def after_capture(self) -> None:
        """End the capture of a forward pass, still within it."""
        for residency in self._choice.residencies:
            residency.after_capture()

    def stats(self) -> PoolStats:
        """Counters since the start, of all residencies together."""
        served = PoolStats(served_rows=self._server.served_rows if self._server else 0)
        return sum((residency.stats() for residency in self._choice.residencies), served)

    def check_integrity(self) -> None:
        """Raise PoolError if leases and slots disagree."""
        for residency in self._choice.residencies:
            residency.check_integrity()

    def close(self) -> None:
        """Stop streaming and serving, and leave the group. Peers keep what they have mapped.

        A second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for residency in self._choice.residencies:
            residency.close()
        if self._server is not None:
            self._server.close()
        self._store.close()
