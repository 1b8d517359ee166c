"""The parts of a pool, made for the layers that a replica owns and those that it borrows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from elbowroom.core.errors import PoolError, UnsupportedModelError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.choice import LeaseChoice, OneMode, StreamedOrShipped
from elbowroom.pool.housekeeper import Housekeeper
from elbowroom.pool.layer import PooledLayer
from elbowroom.pool.leases import Leases, MappedLeases, OwnedLeases, ShippedLeases, SlottedLeases
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.serving import ShipServer
from elbowroom.pool.shipping import Shipper
from elbowroom.pool.store import Store
from elbowroom.pool.streamer import DeviceStreamer, Streamer


@dataclass(frozen=True)
class Layers:
    """The layers of a group as one of its replicas has them, once all are published.

    ``pooled`` has every layer that the pool holds something of. ``owned`` and ``opened`` have the
    bytes (uint8) of this replica's own layers and of its peers'; each is in one of the two.
    """

    share: PoolShare
    store: Store
    options: PoolOptions
    pooled: Mapping[int, PooledLayer]
    owned: Mapping[int, torch.Tensor]
    opened: Mapping[int, torch.Tensor]

    @property
    def shipping_dir(self) -> Path | None:
        """The directory that rows are shipped through. None where they may not be."""
        return self.options.run_dir if self.share.ship_bytes else None

    def of(self, layers: Iterable[int]) -> dict[int, PooledLayer]:
        """Some of the layers."""
        return {layer: self.pooled[layer] for layer in layers}

    def by_layer(self, owned: Leases, borrowed: Leases) -> list[Leases]:
        """The leases that each layer is used by, where owned and borrowed layers have one kind."""
        num_layers = len(self.share.owners)
        return [borrowed if layer in self.opened else owned for layer in range(num_layers)]


def choose_leases(layers: Layers) -> LeaseChoice:
    """Make the leases on all layers, and the rule by which each iteration chooses among them.

    A new residency is given its place here. Raises PoolError when the plan's fetches are not those
    of the borrowed layers.
    """
    share, opened = layers.share, layers.opened
    owned = OwnedLeases(layers.of(layers.owned), layers.owned)
    if share.streams:
        _check_fetches(layers)
    if not opened:
        return OneMode(layers.by_layer(owned, owned))
    if not share.streams:
        return OneMode(layers.by_layer(owned, MappedLeases(layers.of(opened), opened)))
    slotted = SlottedLeases(layers.of(opened), _make_streamer(layers))
    if layers.shipping_dir is None:
        return OneMode(layers.by_layer(owned, slotted))
    _check_shippable(layers)
    return StreamedOrShipped(
        owned,
        slotted,
        _make_shipped(layers, layers.shipping_dir),
        [layer in opened for layer in range(len(share.owners))],
        share.ship_below_rows,
        share.ship_bytes,
    )


def make_server(layers: Layers) -> ShipServer | None:
    """Make the server that runs owned layers for peers; None where no rows are shipped."""
    if layers.shipping_dir is None:
        return None
    share, store, tensor_parallel = layers.share, layers.store, layers.options.tensor_parallel
    served = {
        layer: (
            tensor_parallel.partial(one.modules[0]) if tensor_parallel else one.forwards[0],
            layers.options.dtype or one.tensors()[0].tensor.dtype,
        )
        for layer, one in layers.of(layers.owned).items()
    }
    return ShipServer(
        layers.shipping_dir,
        share.rank,
        share.num_ranks,
        share.ship_bytes,
        served,
        store.mailbox,
        store.device,
        layers.options.turns,
    )


def _check_fetches(layers: Layers) -> None:
    borrowed = sorted(layers.opened)
    fetched = sorted({fetch.layer for fetch in layers.share.fetches})
    if borrowed != fetched:
        raise PoolError(
            f"rank {layers.share.rank} borrows layers {borrowed}, but its plan fetches {fetched}: "
            f"plan again"
        )


def _check_shippable(layers: Layers) -> None:
    several = [layer for layer, one in layers.pooled.items() if len(one.modules) > 1]
    if several:
        raise UnsupportedModelError(
            f"layers {several[:5]} have several feed-forward modules, whose rows cannot be shipped "
            f"as one: use --pool streamed"
        )


def _make_streamer(layers: Layers) -> Streamer:
    fetches, num_slots = layers.share.fetches, layers.share.num_slots
    sources = {
        layer: buffer[: layers.pooled[layer].manifest.data_bytes]
        for layer, buffer in layers.opened.items()
    }
    if layers.store.device.type != "cpu":
        return DeviceStreamer(fetches, sources, num_slots, layers.store.device)
    return Housekeeper(
        fetches,
        sources,
        num_slots,
        layers.options.stream_timeout_seconds,
        layers.options.link_bytes_per_second,
    )


def _make_shipped(layers: Layers, run_dir: Path) -> ShippedLeases:
    share, store, tensor_parallel = layers.share, layers.store, layers.options.tensor_parallel
    shipper = Shipper(
        run_dir,
        share.rank,
        share.ship_bytes,
        store.mailbox,
        layers.options.ship_timeout_seconds,
        store.device,
        layers.options.turns,
    )
    return ShippedLeases(
        layers.of(layers.opened),
        layers.opened,
        share.owners,
        shipper,
        tensor_parallel.reduce if tensor_parallel else None,
    )
