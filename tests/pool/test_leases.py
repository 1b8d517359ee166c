"""Leases on layers in slots, without a group: what goes wrong is noticed and told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.housekeeper import Housekeeper
from elbowroom.pool.layer import PooledLayer, pooled_layer
from elbowroom.pool.leases import SlottedLeases
from elbowroom.pool.slots import Slot
from elbowroom.pool.streamer import DeviceStreamer
from tests.pool.hf import blocks_of, make_model

LAYERS = (1, 3)


class RecordingHousekeeper(Housekeeper):
    """A housekeeper with one slot that remembers the slots it has given."""

    def __init__(self, sources: dict[int, torch.Tensor]) -> None:
        fetches = [Fetch(layer, 0, 1) for layer in LAYERS]
        super().__init__(fetches, sources, num_slots=1, timeout_seconds=5)
        self.given: list[Slot] = []

    def acquire(self, layer: int) -> Slot:
        self.given.append(super().acquire(layer))
        return self.given[-1]


@contextmanager
def _slotted(
    layers: dict[int, PooledLayer], those_there: tuple[int, ...] = LAYERS
) -> Iterator[tuple[SlottedLeases, list[Slot]]]:
    """Leases on ``LAYERS``, and the slots given so far."""
    streamer = RecordingHousekeeper(
        {layer: torch.ones(layers[layer].num_bytes, dtype=torch.uint8) for layer in those_there}
    )
    leases = SlottedLeases(layers, streamer)
    leases.start()
    yield leases, streamer.given
    leases.close()


@pytest.fixture
def layers() -> dict[int, PooledLayer]:
    blocks = blocks_of(make_model("llama", 5))
    found = {layer: pooled_layer(blocks[layer]) for layer in LAYERS}
    for one in found.values():
        assert one is not None
        one.settle()
    return {layer: one for layer, one in found.items() if one is not None}


def test_a_lease_binds_the_slot(layers: dict[int, PooledLayer]) -> None:
    with _slotted(layers) as (leases, given):
        for layer in LAYERS * 2:
            assert leases.acquire(layer) == layers[layer].forwards[0]
            weight = layers[layer].tensors()[0].tensor
            assert weight.data_ptr() == given[-1].buffer.data_ptr()
            leases.check_integrity()
            leases.release(layer)
        assert len({slot.index for slot in given}) == 1
        assert leases.stats().streamed_bytes >= 4 * layers[3].num_bytes


def test_integrity_compares_lease_and_slot(layers: dict[int, PooledLayer]) -> None:
    with _slotted(layers) as (leases, given):
        leases.acquire(1)
        leases.check_integrity()
        given[0].layer = 3
        with pytest.raises(PoolError, match="layer 1 is leased, but slot 0 holds layer 3"):
            leases.check_integrity()


def test_failure_of_the_housekeeper_reaches_the_lease(layers: dict[int, PooledLayer]) -> None:
    with _slotted(layers, those_there=(1,)) as (leases, _):
        leases.acquire(1)
        leases.release(1)
        with pytest.raises(PoolError, match="layer 3 was not streamed") as caught:
            leases.acquire(3)
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_graph_begins_with_the_first_layer(layers: dict[int, PooledLayer]) -> None:
    """Also after a pass that was cut short, which left a later layer in the slot."""
    sources = {layer: torch.full((layers[layer].num_bytes,), layer) for layer in LAYERS}
    bytes_of = {layer: source.to(torch.uint8) for layer, source in sources.items()}
    streamer = DeviceStreamer([Fetch(n, 0, 1) for n in LAYERS], bytes_of, 1, torch.device("cpu"))
    leases = SlottedLeases(layers, streamer)
    leases.start()
    leases.acquire(1)
    leases.release(1)
    assert streamer.buffers[0][0] == 3
    leases.before_graph()
    assert streamer.buffers[0][0] == 1
    leases.close()
