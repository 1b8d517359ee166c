"""Loading: a model's blocks are taken over one by one, and become a pool when weights are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import PoolError, UnsupportedModelError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.choice import LeaseChoice, OneMode, StreamedOrShipped
from elbowroom.pool.ffn import Ffn, Forward, find_ffn, frozen
from elbowroom.pool.housekeeper import STREAM_TIMEOUT_SECONDS, Housekeeper
from elbowroom.pool.leases import (
    Leases,
    MappedLeases,
    OwnedLeases,
    Reduce,
    ShippedLeases,
    SlottedLeases,
)
from elbowroom.pool.pool import Pool
from elbowroom.pool.shipping import SHIP_TIMEOUT_SECONDS, Shipper, ShipServer
from elbowroom.pool.store import Store
from elbowroom.pool.streamer import DeviceStreamer, Streamer

PEER_TIMEOUT_SECONDS = 600.0
"""Seconds to wait until a peer publishes a layer: reading a large model takes minutes."""

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Brings a matrix into the form its kernel wants; same shape, dtype and bytes."""


class TensorParallel(NamedTuple):
    """What shipping needs where a replica's ranks each hold a part of every matrix.

    ``partial`` gives a feed-forward module's forward without the sum over its ranks. Its result
    goes back to the rank that asked, and ``reduce`` sums over the ranks of that one's replica.
    """

    partial: Callable[[nn.Module], Forward]
    reduce: Reduce


@dataclass(frozen=True)
class PoolOptions:
    """Settings of a pool that its plan does not hold.

    ``pack`` is applied to every matrix before it is published. ``run_dir`` is where rows are
    shipped through, if the share says that they may be; without it none are.
    ``link_bytes_per_second`` holds streaming back, see ``Housekeeper``.
    """

    pack: Pack | None = None
    run_dir: Path | None = None
    tensor_parallel: TensorParallel | None = None
    link_bytes_per_second: float = float("inf")
    peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS
    stream_timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ship_timeout_seconds: float = SHIP_TIMEOUT_SECONDS


class PoolLoader:
    """The pool of one replica while its model is built and loaded.

    ``add_block`` for every block in order, load weights, then ``attach`` gives the pool.
    """

    def __init__(self, share: PoolShare, store: Store, options: PoolOptions | None = None) -> None:
        self._share = share
        self._store = store
        self._options = options or PoolOptions()
        self._ffns: list[Ffn] = []
        self._allocated: dict[int, torch.Tensor] = {}
        self._reopened: dict[int, torch.Tensor] = {}

    def owns(self, layer: int) -> bool:
        return self._share.owners[layer] == self._share.rank

    def add_block(self, block: nn.Module, keep_weights: bool = True) -> Ffn:
        """Take over the next block's feed-forward weights.

        An owned layer's matrices move into the store. Those of a borrowed layer, and of one that an
        earlier process of this rank has published, become placeholders on the meta device, which
        hold no memory. ``keep_weights`` False skips copying the present values, for weights that
        are loaded later.

        Raises UnsupportedModelError for a block that the pool cannot hold.
        """
        layer = len(self._ffns)
        if layer >= len(self._share.owners):
            raise UnsupportedModelError(
                f"the plan knows {len(self._share.owners)} layers, {type(block).__name__} is one "
                f"more: models with a second stack of blocks cannot be pooled, use --pool none"
            )
        ffn = find_ffn(block)
        self._ffns.append(ffn)
        if not self.owns(layer):
            _replace_with_placeholders(ffn)
            return ffn
        published = self._store.reopen(layer, self._share.rank, ffn.num_bytes)
        if published is None:
            self._allocated[layer] = self._store.allocate(layer, ffn.num_bytes)
            _move_weights(ffn, self._allocated[layer], keep_weights)
        else:
            self._reopened[layer] = published
            _replace_with_placeholders(ffn)
        return ffn

    def attach(self) -> Pool:
        """Publish what this rank owns, open what its peers own, and make the pool of both.

        Waits for the peers. From here on ``Pool.run`` is each feed-forward module's ``forward``.
        Raises PeerLostError when a peer dies or does not publish in time, and PoolError when the
        plan's fetches are not those of the layers that this rank borrows.
        """
        self._publish()
        choice = self._lease(self._open_borrowed())
        pool = Pool(self._share, self._store, choice, self._make_server())
        for layer, ffn in enumerate(self._ffns):
            ffn.module.forward = partial(pool.run, layer)
        return pool

    def _publish(self) -> None:
        pack = self._options.pack
        for layer, buffer in self._allocated.items():
            if pack is not None:
                for matrix in (span.view(buffer) for span in self._ffns[layer].spans):
                    matrix.copy_(pack(matrix))
            self._store.publish(layer)

    def _open_borrowed(self) -> dict[int, torch.Tensor]:
        timeout = self._options.peer_timeout_seconds
        return {
            layer: self._store.open(layer, self._share.owners[layer], ffn.num_bytes, timeout)
            for layer, ffn in enumerate(self._ffns)
            if not self.owns(layer)
        }

    def _lease(self, opened: dict[int, torch.Tensor]) -> LeaseChoice:
        """Decide by which leases each layer is used. A new residency is given its place here."""
        owned = OwnedLeases(self._ffns_of(self._owned), self._owned)
        ffns = self._ffns_of(opened)
        if self._share.streams:
            self._check_fetches(opened)
        if not opened:
            return OneMode(self._by_layer(owned, owned))
        if not self._share.streams:
            return OneMode(self._by_layer(owned, MappedLeases(ffns, opened)))
        slotted = SlottedLeases(ffns, self._make_streamer(opened))
        if self._shipping_dir is None:
            return OneMode(self._by_layer(owned, slotted))
        shipped = self._make_shipped(opened, self._shipping_dir)
        return StreamedOrShipped(
            owned,
            slotted,
            shipped,
            [layer in opened for layer in range(len(self._ffns))],
            self._share.ship_below_rows,
            self._share.ship_bytes,
        )

    @property
    def _owned(self) -> dict[int, torch.Tensor]:
        return self._allocated | self._reopened

    @property
    def _shipping_dir(self) -> Path | None:
        """The directory that rows are shipped through. None where they may not be."""
        return self._options.run_dir if self._share.ship_bytes else None

    def _ffns_of(self, layers: Iterable[int]) -> dict[int, Ffn]:
        return {layer: self._ffns[layer] for layer in layers}

    def _by_layer(self, owned: Leases, borrowed: Leases) -> list[Leases]:
        return [owned if self.owns(layer) else borrowed for layer in range(len(self._ffns))]

    def _check_fetches(self, opened: dict[int, torch.Tensor]) -> None:
        fetched = sorted({fetch.layer for fetch in self._share.fetches})
        if sorted(opened) != fetched:
            raise PoolError(
                f"rank {self._share.rank} borrows layers {sorted(opened)}, but its plan fetches "
                f"{fetched}: plan again"
            )

    def _make_streamer(self, opened: dict[int, torch.Tensor]) -> Streamer:
        fetches, num_slots = self._share.fetches, self._share.num_slots
        if self._store.device.type != "cpu":
            return DeviceStreamer(fetches, opened, num_slots, self._store.device)
        return Housekeeper(
            fetches,
            opened,
            num_slots,
            self._options.stream_timeout_seconds,
            self._options.link_bytes_per_second,
        )

    def _make_shipped(self, opened: dict[int, torch.Tensor], run_dir: Path) -> ShippedLeases:
        share, store, tensor_parallel = self._share, self._store, self._options.tensor_parallel
        shipper = Shipper(
            run_dir,
            share.rank,
            share.ship_bytes,
            store.mailbox,
            self._options.ship_timeout_seconds,
            store.device,
        )
        return ShippedLeases(
            self._ffns_of(opened),
            opened,
            share.owners,
            shipper,
            store.outlives_owner,
            tensor_parallel.reduce if tensor_parallel else None,
        )

    def _make_server(self) -> ShipServer | None:
        """The server of what this rank owns; None where no rows are shipped."""
        if self._shipping_dir is None:
            return None
        share, store, tensor_parallel = self._share, self._store, self._options.tensor_parallel
        served = {
            layer: (
                tensor_parallel.partial(ffn.module) if tensor_parallel else ffn.forward,
                ffn.spans[0].dtype,
            )
            for layer, ffn in self._ffns_of(self._owned).items()
        }
        return ShipServer(
            self._shipping_dir,
            share.rank,
            share.num_ranks,
            share.ship_bytes,
            served,
            store.mailbox,
            store.device,
        )


def _move_weights(ffn: Ffn, buffer: torch.Tensor, keep_values: bool) -> None:
    """Have the matrices of ``ffn`` lie in ``buffer`` (uint8), as they are loaded into it later."""
    for span in ffn.spans:
        weight = span.view(buffer)
        if keep_values:
            weight.copy_(span.linear.get_parameter("weight"))
        span.linear.weight.data = weight


def _replace_with_placeholders(ffn: Ffn) -> None:
    for span in ffn.spans:
        span.linear.weight = frozen(torch.empty(span.shape, dtype=span.dtype, device="meta"))
