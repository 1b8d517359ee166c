"""The store in the memory of GPUs, on the stand-in for CUDA's runtime.

Each rank has a runtime of its own, as a process has. Groups of real processes are in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.core.units import KIB, MIB
from elbowroom.pool.serving import ShipServer
from elbowroom.pool.shipping import Shipper
from elbowroom.pool.store import Store
from tests.pool.fake_cudart import FakeRuntime, cudaError_t, fake_folder, load_store
from tests.pool.fake_device import FakeDevice
from tests.pool.fake_operations import Issuing

CPU = torch.device("cpu")
LAYER, NUM_BYTES = 3, 64 * KIB
TOTAL = MIB


class _Rank(NamedTuple):
    store: Store
    runtime: FakeRuntime

    def publish(self, layer: int = LAYER, value: int = 7) -> torch.Tensor:
        buffer = self.store.allocate(layer, NUM_BYTES)
        buffer.fill_(value)
        self.store.publish(layer)
        return buffer

    def open(self, layer: int = LAYER, owner: int = 0) -> torch.Tensor:
        return self.store.open(layer, owner, NUM_BYTES, 1)

    def end(self) -> None:
        """End as a process does that is killed: its locks and its memory go."""
        self.store.close()
        self.runtime.end()


Start = Callable[[int], _Rank]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    ranks = []

    def start(rank: int) -> _Rank:
        runtime = FakeRuntime(fake_folder(tmp_path), TOTAL)
        ranks.append(_Rank(load_store(runtime).CudaStore(tmp_path, rank, CPU), runtime))
        return ranks[-1]

    yield start
    for one in ranks:
        one.store.close()


def test_peers_read_what_an_owner_published(start: Start) -> None:
    owner, peer, third = start(0), start(1), start(2)
    buffer = owner.publish()
    for opened in (peer.open(), third.open()):
        assert torch.equal(opened, buffer)
    assert owner.store.device_bytes == NUM_BYTES
    assert peer.store.device_bytes == 0
    assert peer.runtime.cudaMemGetInfo()[1:] == (TOTAL - NUM_BYTES, TOTAL)


def test_what_is_published_has_been_written(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers copy on streams of their own, which do not know what the owner's still has to do."""
    owner, peer, device = start(0), start(1), FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    buffer = owner.store.allocate(LAYER, NUM_BYTES)
    with torch.inference_mode(), Issuing(device):
        buffer.fill_(7)
        owner.store.publish(LAYER)
    assert set(peer.open().tolist()) == {7}


def test_a_layer_opened_twice_is_closed_twice(start: Start) -> None:
    owner, peer = start(0), start(1)
    owner.publish()
    first, second = peer.open(), peer.open()
    del first
    assert set(second.tolist()) == {7}


def test_mailboxes_are_written_by_both(start: Start) -> None:
    owner, borrower = start(0), start(1)
    theirs = borrower.store.mailbox(1, 0, NUM_BYTES)
    ours = owner.store.mailbox(1, 0, NUM_BYTES)
    theirs[:8].fill_(1)
    ours[8:16].fill_(2)
    assert torch.equal(ours, theirs)
    assert set(ours[:8].tolist()) == {1}
    assert borrower.store.device_bytes == NUM_BYTES
    assert owner.store.device_bytes == 0


def test_memory_is_given_back_when_nobody_uses_it(start: Start) -> None:
    owner, peer = start(0), start(1)
    buffer = owner.publish()
    opened = peer.open()
    owner.store.close()
    del opened
    assert _free(peer) == TOTAL - NUM_BYTES
    del buffer
    assert _free(peer) == TOTAL


def test_what_was_opened_outlives_its_owner(start: Start) -> None:
    owner, peer = start(0), start(1)
    owner.publish()
    opened = peer.open()
    owner.end()
    assert _free(peer) == TOTAL - NUM_BYTES
    other = start(2)
    other.store.allocate(0, _free(other)).fill_(255)
    assert set(opened.tolist()) == {7}
    del opened
    assert _free(peer) == NUM_BYTES


def test_memory_of_a_borrower_that_died_is_given_back(start: Start) -> None:
    owner, peer = start(0), start(1)
    buffer = owner.publish()
    peer.open()
    peer.end()
    owner.store.close()
    del buffer
    assert _free(owner) == TOTAL


def test_nobody_opens_what_a_dead_owner_left(start: Start) -> None:
    owner, peer = start(0), start(1)
    owner.publish()
    owner.end()
    with pytest.raises(PeerLostError, match=r"rank 0 .*layer 3"):
        peer.open()


def test_a_new_process_of_a_rank_takes_new_memory(start: Start) -> None:
    first, peer = start(0), start(1)
    first.publish(value=7)
    opened = peer.open()
    first.end()
    second = start(0)
    assert not second.store.was_published(LAYER)
    second.publish(value=9)
    assert set(peer.open().tolist()) == {9}
    assert set(opened.tolist()) == {7}, "what was opened before stays"


def test_rows_of_a_borrower_that_was_started_again(start: Start, tmp_path: Path) -> None:
    """Its mailbox is new memory, while the owner still has that of the process before it open."""
    owner = start(0)
    layers = {LAYER: (lambda x: x + 1, torch.float32)}
    server = ShipServer(tmp_path, 0, 2, KIB, layers, owner.store.mailbox)
    server.start()
    for value in (1.0, 2.0):
        borrower = start(1)
        shipper = Shipper(tmp_path, 1, KIB, borrower.store.mailbox)
        rows = torch.full((2, 4), value)
        assert torch.equal(shipper.wait(shipper.start(0, LAYER, rows)), rows + 1)
        shipper.close()
        borrower.end()
    server.close()


def test_a_full_device_names_what_needs_memory_and_what_is_free(start: Start) -> None:
    owner = start(0)
    owner.store.allocate(0, TOTAL - NUM_BYTES)
    with pytest.raises(PoolError, match=r"layer 5 .*128 KiB.*64 KiB.*--memory.*--pool none"):
        owner.store.allocate(5, 2 * NUM_BYTES)
    with pytest.raises(PoolError, match=r"rank 1 .*128 KiB.*64 KiB"):
        owner.store.mailbox(0, 1, 2 * NUM_BYTES)
    assert owner.store.device_bytes == TOTAL - NUM_BYTES, "what failed does not count"


def test_another_number_of_bytes_is_refused(start: Start) -> None:
    owner, peer = start(0), start(1)
    owner.publish()
    with pytest.raises(PeerLostError, match=str(NUM_BYTES)):
        peer.store.open(LAYER, 0, NUM_BYTES + 1, 1)
    assert peer.runtime.cudaMemGetInfo()[0] is cudaError_t.cudaSuccess


def test_the_owner_does_not_open_its_own(start: Start) -> None:
    owner = start(0)
    owner.publish()
    with pytest.raises(PoolError, match="cudaErrorDeviceUninitialized"):
        owner.open()


def test_a_handle_that_names_nothing(start: Start, tmp_path: Path) -> None:
    owner, peer = start(0), start(1)
    owner.publish()
    (tmp_path / f"layer-{LAYER:04d}").write_bytes(b"?" * 64 + b"1")
    with pytest.raises(PoolError, match="cudaErrorInvalidValue"):
        peer.open()


def test_a_device_that_is_not_there(start: Start, tmp_path: Path) -> None:
    runtime = FakeRuntime(fake_folder(tmp_path))
    store = load_store(runtime).CudaStore(tmp_path, 0, torch.device("cpu", 1))
    with pytest.raises(PoolError, match="cudaErrorInvalidDevice"):
        store.allocate(LAYER, NUM_BYTES)
    store.close()


def test_freeing_before_others_have_closed_is_an_error(start: Start) -> None:
    owner, peer = start(0), start(1)
    buffer = owner.publish()
    opened = peer.open()
    assert owner.runtime.cudaFree(buffer.data_ptr()) == (cudaError_t.cudaErrorInvalidValue,)
    assert set(opened.tolist()) == {7}
    address = opened.data_ptr()
    assert peer.runtime.cudaFree(address) == (cudaError_t.cudaErrorInvalidValue,)
    del opened
    assert peer.runtime.cudaIpcCloseMemHandle(address) == (cudaError_t.cudaErrorInvalidValue,)
    assert peer.runtime.cudaPointerGetAttributes(address)[0] is cudaError_t.cudaErrorInvalidValue


def _free(rank: _Rank) -> int:
    return rank.runtime.cudaMemGetInfo()[1]
