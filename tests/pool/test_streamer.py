"""Streaming with a device's streams and events. On a CPU these do nothing: the order is tested.

Whether copies and compute wait for each other is tested in test_streamer_order.py, and on a GPU in
tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.slots import Slot
from elbowroom.pool.streamer import DeviceStreamer

CPU = torch.device("cpu")
LAYERS = (1, 2, 4, 5, 7)  # those that a rank borrows
NUM_BYTES = {layer: 100 + layer for layer in LAYERS}


@pytest.fixture(params=[1, 2, 3, 5, 9])
def streamer(request: pytest.FixtureRequest) -> DeviceStreamer:
    """A streamer of layers full of their number, sliced or not, with so many slots."""
    sources = {
        layer: torch.full((size,), layer, dtype=torch.uint8) for layer, size in NUM_BYTES.items()
    }
    chunks = 2 if request.param == 3 else 1
    fetches = [Fetch(layer, chunk, chunks) for layer in LAYERS for chunk in range(chunks)]
    one = DeviceStreamer(fetches, sources, request.param, CPU)
    one.start()
    return one


def _run(streamer: DeviceStreamer, layers: tuple[int, ...]) -> list[int]:
    """Lease layers one after the other; where each lay."""
    addresses = []
    for layer in layers:
        slot = streamer.acquire(layer)
        _expect(slot, layer)
        streamer.check_integrity()
        addresses.append(slot.buffer.data_ptr())
        streamer.release(slot)
    return addresses


def _expect(slot: Slot, layer: int) -> None:
    assert slot.layer == layer
    assert set(slot.buffer[: NUM_BYTES[layer]].tolist()) == {layer}


def test_every_pass_finds_its_layers_where_the_last_one_did(streamer: DeviceStreamer) -> None:
    first = _run(streamer, LAYERS)
    assert _run(streamer, LAYERS) == first
    assert set(first) == {buffer.data_ptr() for buffer in streamer.buffers}
    per_pass = sum(NUM_BYTES.values())
    ahead = sum(NUM_BYTES[layer] for layer in LAYERS[: len(streamer.buffers)])
    assert streamer.streamed_bytes == 2 * per_pass + ahead
    streamer.close()


def test_a_pass_that_was_cut_short(streamer: DeviceStreamer) -> None:
    for length in range(len(LAYERS)):
        _run(streamer, LAYERS[:length])
        streamer.restart()
    _run(streamer, LAYERS)


def test_passes_without_streaming_between(streamer: DeviceStreamer) -> None:
    _run(streamer, LAYERS)
    before = streamer.streamed_bytes
    streamer.pause()
    streamer.resume()
    assert streamer.streamed_bytes == before, "what was fetched ahead is still there"
    _run(streamer, LAYERS)


def test_a_pause_in_the_middle_of_a_pass(streamer: DeviceStreamer) -> None:
    """The next pass begins with the first layer, whatever the last one left in the slots."""
    _run(streamer, LAYERS[:2])
    streamer.pause()
    streamer.resume()
    _run(streamer, LAYERS)
    streamer.close()


def test_no_slot_stands_for_another_layer(streamer: DeviceStreamer) -> None:
    if len(streamer.buffers) == len(LAYERS):
        pytest.skip("every layer has a slot")
    with pytest.raises(PoolError, match=f"asked for was {LAYERS[-1]}"):
        streamer.acquire(LAYERS[-1])
    streamer.close()
