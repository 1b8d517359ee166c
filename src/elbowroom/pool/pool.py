"""The pool of one rank: takes over the feed-forward weights of a model's blocks and leases them.

Life: ``add_block`` for every block in order, load weights, ``attach`` (publishes what this rank
owns, opens what its peers own), ``start``, forward passes, ``close``. The forward passes need no
change: each feed-forward module's ``forward`` is replaced by one that takes the lease on its
weights, runs the original and gives the lease back; or that ships the rows to the owner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.choice import Chooser
from elbowroom.pool.ffn import Ffn, find_ffn
from elbowroom.pool.housekeeper import STREAM_TIMEOUT_SECONDS, Housekeeper
from elbowroom.pool.shipping import SHIP_TIMEOUT_SECONDS, Forward, Shipper, ShipServer
from elbowroom.pool.slots import Slot
from elbowroom.pool.stats import PoolStats
from elbowroom.pool.store import Store
from elbowroom.pool.streamer import DeviceStreamer, Streamer

PEER_TIMEOUT_SECONDS = 600.0
"""How long a rank waits for a peer to publish a layer: reading a large model takes minutes."""

LOST_SECONDS = 5.0
"""How long an owner that died is not asked again; its layers are read where they lie."""

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Brings a matrix into the form its kernel wants; same shape, dtype and bytes."""


class TensorParallel(NamedTuple):
    """How rows are shipped where a replica's ranks each hold a part of every matrix.

    ``partial`` gives a feed-forward module's forward without the sum over its ranks. Its result
    goes back to the rank that asked, and ``reduce`` sums over the ranks of that one's replica.
    """

    partial: Callable[[nn.Module], Forward]
    reduce: Callable[[torch.Tensor], torch.Tensor]


class Pool:
    """One rank's view of the pool. Not thread-safe: one thread computes.

    ``run_dir`` is where rows are shipped through, if the share says that they may be.
    ``link_bytes_per_second`` holds streaming back, see ``Housekeeper``.
    """

    def __init__(
        self,
        share: PoolShare,
        store: Store,
        pack: Pack | None = None,
        peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
        stream_timeout_seconds: float = STREAM_TIMEOUT_SECONDS,
        ship_timeout_seconds: float = SHIP_TIMEOUT_SECONDS,
        run_dir: Path | None = None,
        link_bytes_per_second: float = float("inf"),
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        self.share = share
        self._tensor_parallel = tensor_parallel
        self._store = store
        self._pack = pack
        self._peer_timeout_seconds = peer_timeout_seconds
        self._stream_timeout_seconds = stream_timeout_seconds
        self._ship_timeout_seconds = ship_timeout_seconds
        self._run_dir = run_dir
        self._link_bytes_per_second = link_bytes_per_second
        self._ffns: list[Ffn] = []
        self._owned: dict[int, torch.Tensor] = {}
        self._reopened: dict[int, torch.Tensor] = {}
        self._streamer: Streamer | None = None
        self._slot_weights: dict[tuple[int, int], list[nn.Parameter]] = {}
        self._streamed_layers = sorted({fetch.layer for fetch in share.fetches})
        self._next_streamed = 0
        self._lease: int | None = None
        self._slot: Slot | None = None
        self._opened: dict[int, torch.Tensor] = {}
        self._forwards: list[Forward] = []
        self._shipper: Shipper | None = None
        self._server: ShipServer | None = None
        self._iteration: _Iteration | None = None
        self._chooser: Chooser | None = None
        self._lost_until: dict[int, float] = {}
        self._mapped_bytes = 0
        self._wait_seconds = 0.0
        self._streamed_iterations = self._shipped_iterations = self._shipped_rows = 0

    def owns(self, layer: int) -> bool:
        return self.share.owners[layer] == self.share.rank

    def add_block(self, block: nn.Module, keep_weights: bool = True) -> Ffn:
        """Take over the next block's feed-forward weights.

        An owned layer's matrices move into the store. Those of a borrowed layer, and of one that an
        earlier process of this rank has published, become placeholders on the meta device, which
        hold no memory. ``keep_weights`` False skips copying the present values, for weights that
        are loaded later.

        Raises UnsupportedModelError for a block that the pool cannot hold.
        """
        layer = len(self._ffns)
        if layer >= len(self.share.owners):
            raise UnsupportedModelError(
                f"the plan knows {len(self.share.owners)} layers, {type(block).__name__} is one "
                f"more: models with a second stack of blocks cannot be pooled, use --pool none"
            )
        ffn = find_ffn(block)
        self._ffns.append(ffn)
        is_new = self.owns(layer)
        if self.owns(layer):
            before = self._store.reopen(layer, self.share.rank, ffn.num_bytes)
            if before is not None:
                self._reopened[layer] = before
                is_new = False
        if is_new:
            self._owned[layer] = self._store.allocate(layer, ffn.num_bytes)
            for span in ffn.spans:
                weight = span.view(self._owned[layer])
                if keep_weights:
                    weight.copy_(span.linear.get_parameter("weight"))
                span.linear.weight.data = weight
        else:
            for span in ffn.spans:
                span.linear.weight = _frozen(
                    torch.empty(span.shape, dtype=span.dtype, device="meta")
                )
        self._forwards.append(ffn.module.forward)
        ffn.module.forward = partial(self._forward, layer)
        return ffn

    def attach(self) -> None:
        """Publish what this rank owns, then open what its peers own; waits for them.

        Raises PeerLostError when a peer dies or does not publish in time.
        """
        for layer, buffer in self._owned.items():
            for span in self._ffns[layer].spans:
                if self._pack is not None:
                    view = span.view(buffer)
                    view.copy_(self._pack(view))
            self._use(layer, buffer)
            self._store.publish(layer)
        for layer, buffer in self._reopened.items():
            self._use(layer, buffer)
        self._owned |= self._reopened
        opened = {
            layer: self._store.open(
                layer, self.share.owners[layer], ffn.num_bytes, self._peer_timeout_seconds
            )
            for layer, ffn in enumerate(self._ffns)
            if not self.owns(layer)
        }
        self._opened = opened
        if self.share.streams:
            self._prepare_streaming(opened)
        else:
            self._map(opened)
        if self.share.ship_bytes and self._run_dir is not None:
            self._prepare_shipping(self._run_dir)

    def start(self) -> None:
        """Begin to stream and to serve: from here on slots fill ahead of compute."""
        if self._streamer is not None:
            self._streamer.start()
        if self._server is not None:
            self._server.start()

    def acquire(self, layer: int) -> None:
        """Take the lease on a layer: its matrices are usable until ``release``.

        Raises PoolError when another lease is open, when streamed layers are asked for out of
        order, or when the layer does not arrive in time.
        """
        if self._lease is not None:
            raise PoolError(f"layer {layer} asked for while layer {self._lease} is leased")
        if self._streamer is not None and not self.owns(layer):
            self._slot = self._wait_for_slot(layer, self._streamer)
            weights = self._slot_weights[self._slot.index, layer]
            for span, weight in zip(self._ffns[layer].spans, weights, strict=True):
                span.linear.weight = weight
        self._lease = layer

    def release(self, layer: int) -> None:
        """End the lease on a layer. Its slot, if it has one, is free for the next."""
        if self._lease != layer:
            raise PoolError(f"layer {layer} released, but {self._lease} is leased")
        self._lease = None
        if self._slot is not None and self._streamer is not None:
            self._streamer.release(self._slot)
            self._slot = None

    def stats(self) -> PoolStats:
        return PoolStats(
            owned_bytes=sum(buffer.numel() for buffer in self._owned.values()),
            mapped_bytes=self._mapped_bytes,
            slot_bytes=sum(b.numel() for b in self._streamer.buffers) if self._streamer else 0,
            streamed_bytes=self._streamer.streamed_bytes if self._streamer else 0,
            wait_seconds=self._wait_seconds,
            streamed_iterations=self._streamed_iterations,
            shipped_iterations=self._shipped_iterations,
            shipped_rows=self._shipped_rows,
            served_rows=self._server.served_rows if self._server else 0,
        )

    def check_integrity(self) -> None:
        """Raise PoolError if the lease and the slots disagree."""
        if self._slot is not None and self._slot.layer != self._lease:
            raise PoolError(f"lease on {self._lease}, slot {self._slot.index} on another layer")
        if self._streamer is not None:
            self._streamer.check_integrity()

    def close(self) -> None:
        """Stop streaming and serving, and leave the group. Peers keep what they have mapped."""
        for part in (self._streamer, self._server, self._shipper):
            if part is not None:
                part.close()
        self._streamer = self._server = self._shipper = None
        self._store.close()

    def _map(self, opened: dict[int, torch.Tensor]) -> None:
        for layer, buffer in opened.items():
            self._use(layer, buffer)
            self._mapped_bytes += buffer.numel()

    def _use(self, layer: int, buffer: torch.Tensor) -> None:
        for span in self._ffns[layer].spans:
            span.linear.weight = _frozen(span.view(buffer))

    def _prepare_streaming(self, opened: dict[int, torch.Tensor]) -> None:
        if set(opened) != set(self._streamed_layers):
            raise PoolError(
                f"rank {self.share.rank} borrows layers {sorted(opened)}, but its plan fetches "
                f"{self._streamed_layers}: plan again"
            )
        if not opened:
            return
        self._streamer = self._make_streamer(opened)
        for layer in opened:
            for index, buffer in enumerate(self._streamer.buffers):
                self._slot_weights[index, layer] = [
                    _frozen(span.view(buffer)) for span in self._ffns[layer].spans
                ]

    def _make_streamer(self, opened: dict[int, torch.Tensor]) -> Streamer:
        fetches, num_slots = self.share.fetches, self.share.num_slots
        if self._store.device.type != "cpu":
            return DeviceStreamer(fetches, opened, num_slots, self._store.device)
        return Housekeeper(
            fetches, opened, num_slots, self._stream_timeout_seconds, self._link_bytes_per_second
        )

    def _prepare_shipping(self, run_dir: Path) -> None:
        share, store = self.share, self._store
        served = {
            layer: (self._served_forward(layer), self._ffns[layer].spans[0].dtype)
            for layer in self._owned
        }
        self._server = ShipServer(
            run_dir,
            share.rank,
            share.num_ranks,
            share.ship_bytes,
            served,
            store.mailbox,
            store.device,
        )
        if self._streamer is not None:
            self._shipper = Shipper(
                run_dir,
                share.rank,
                share.ship_bytes,
                store.mailbox,
                self._ship_timeout_seconds,
                store.device,
            )

    def _served_forward(self, layer: int) -> Forward:
        if self._tensor_parallel is None:
            return self._forwards[layer]
        return self._tensor_parallel.partial(self._ffns[layer].module)

    def _wait_for_slot(self, layer: int, streamer: Streamer) -> Slot:
        if layer != self._streamed_layers[self._next_streamed]:
            if layer != self._streamed_layers[0]:
                raise PoolError(
                    f"layer {layer} asked for, layer {self._streamed_layers[self._next_streamed]} "
                    f"is next: a streamed pool runs its layers in order"
                )
            streamer.restart()  # the last pass was cut short, by an exception for instance
            self._next_streamed = 0
        start = time.perf_counter()
        slot = streamer.acquire(layer)
        self._wait_seconds += time.perf_counter() - start
        self._next_streamed = (self._next_streamed + 1) % len(self._streamed_layers)
        return slot

    def _forward(self, layer: int, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a pooled module runs in place of its own ``forward``."""
        if layer == 0:
            self._begin_iteration(x)
        iteration, run = self._iteration, partial(self._forwards[layer], x, *args, **kwargs)
        if iteration is None or not (iteration.ships or self.owns(layer)):
            return self._run_leased(layer, run)
        if self.owns(layer):
            begin = time.perf_counter()
            out = self._run_leased(layer, run)
            iteration.add_own(time.perf_counter() - begin)
            return out
        # What a module is given beside its rows stays here, and so does its pass.
        shipped = None if args or kwargs else self._ship(layer, x, iteration)
        if shipped is not None:
            return shipped
        self._use(layer, self._opened[layer])
        return run()

    def _run_leased(self, layer: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.acquire(layer)
        try:
            return run()
        finally:
            self.release(layer)

    def _begin_iteration(self, x: torch.Tensor) -> None:
        """Choose its mode, after the chooser was told how the last one went."""
        if self._streamer is None:
            return
        if self._shipper is None:
            self._streamed_iterations += 1
            return
        rows = x.flatten(0, -2)
        if self._chooser is None:
            most_rows = self.share.ship_bytes // rows[0].nbytes
            self._chooser = Chooser(self.share.ship_below_rows, most_rows)
        last = self._iteration
        if last is not None and last.ships:
            self._chooser.shipped(last.num_rows, last.ship_extra_seconds)
        elif last is not None:
            self._chooser.streamed(self._wait_seconds - last.waited_before)
        ships = self._chooser.choose(len(rows)) == "ship"
        if ships != (last is not None and last.ships):
            self._next_streamed = 0
            self._streamer.pause() if ships else self._streamer.resume()
        self._iteration = _Iteration(ships, len(rows), self._wait_seconds)
        self._shipped_iterations += ships
        self._streamed_iterations += not ships

    def _ship(self, layer: int, x: torch.Tensor, iteration: _Iteration) -> torch.Tensor | None:
        """What the owner made of ``x``. None where it died and its weights can still be read."""
        assert self._shipper is not None
        owner = self.share.owners[layer]
        begin = time.perf_counter()
        if begin < self._lost_until.get(owner, 0.0):
            return None
        try:
            out = self._shipper.wait(self._shipper.start(owner, layer, x.flatten(0, -2)))
            if self._tensor_parallel is not None:
                out = self._tensor_parallel.reduce(out)
        except PeerLostError:
            if not self._store.outlives_owner:
                raise
            self._lost_until[owner] = time.perf_counter() + LOST_SECONDS
            return None
        seconds = time.perf_counter() - begin
        self._wait_seconds += seconds
        iteration.add_shipped(seconds)
        self._shipped_rows += iteration.num_rows
        return out.view(*x.shape[:-1], out.shape[-1])


@dataclass
class _Iteration:
    """What is known of the iteration under way, for the chooser."""

    ships: bool
    num_rows: int
    waited_before: float
    own_seconds: float = 0.0
    num_own: int = 0
    shipped_seconds: float = 0.0
    num_shipped: int = 0

    def add_own(self, seconds: float) -> None:
        self.own_seconds += seconds
        self.num_own += 1

    def add_shipped(self, seconds: float) -> None:
        self.shipped_seconds += seconds
        self.num_shipped += 1

    @property
    def ship_extra_seconds(self) -> float:
        """What shipping took beyond running as many layers here, as those of our own took."""
        here = self.own_seconds / max(1, self.num_own)
        return self.shipped_seconds - self.num_shipped * here


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
