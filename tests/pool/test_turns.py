"""Peers are served between the layers of a pass, and by a thread only while no pass is under way.

The modules here ask for their surroundings as vLLM's mixtures do: one attribute of a rank, which a
pass sets, and which whoever runs a layer for a peer sets for that layer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from elbowroom.core.errors import PoolError
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions, TensorParallel
from elbowroom.pool.pool import Pool
from elbowroom.pool.run_dir import hold_lock
from elbowroom.pool.serving import ShipServer
from elbowroom.pool.shared_memory import SharedMemoryStore, alive_path, shared_mailbox
from elbowroom.pool.turns import Turns
from tests.pool.groups import NUM_LAYERS, all_at_once, make_shares
from tests.pool.test_shipping import BUFFER_BYTES, COLUMNS, forward_of, shipper

WIDTH = 32
PASS = "a pass"


class Surroundings:
    """What the modules of one rank run in, and who ran them for peers."""

    def __init__(self) -> None:
        self.current: object = None
        self.served: list[tuple[int, int, threading.Thread]] = []

    @contextmanager
    def set(self, current: object) -> Iterator[None]:
        before, self.current = self.current, current
        try:
            yield
        finally:
            self.current = before


class Ffn(nn.Module):
    """Whole numbers, so that a row comes out the same in any batch, and on any rank."""

    def __init__(self, layer: int, surroundings: Surroundings) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(layer)
        for name in ("up_proj", "down_proj"):
            linear = nn.Linear(WIDTH, WIDTH, bias=False)
            linear.weight.data = torch.randint(-2, 3, (WIDTH, WIDTH), generator=numbers).float()
            self.add_module(name, linear)
        self.layer, self.surroundings = layer, surroundings
        self.before: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.surroundings.current
        assert found is not None, "a module asks for its surroundings"
        if found != PASS:
            assert found == len(x), "a peer's rows have surroundings of their own"
            self.surroundings.served.append((self.layer, len(x), threading.current_thread()))
        else:
            self.before()
        out: torch.Tensor = self.down_proj(self.up_proj(x).relu())
        assert self.surroundings.current is found, "nobody changed them meanwhile"
        return out.remainder(7)


class Block(nn.Module):
    def __init__(self, layer: int, surroundings: Surroundings) -> None:
        super().__init__()
        self.mlp = Ffn(layer, surroundings)


class Rank(NamedTuple):
    surroundings: Surroundings
    turns: Turns
    blocks: list[Block]
    pool: Pool

    def run(self, x: torch.Tensor, amid: Callable[[int], None] = lambda _: None) -> torch.Tensor:
        """One forward pass, which calls ``amid`` where attention would be, after each layer."""
        with torch.inference_mode(), self.turns.forward_pass(), self.surroundings.set(PASS):
            for layer, block in enumerate(self.blocks):
                x = x + block.mlp(x)
                amid(layer)
                assert self.surroundings.current == PASS, "a pass keeps its surroundings"
        return x


def plain(x: torch.Tensor) -> torch.Tensor:
    surroundings = Surroundings()
    with torch.inference_mode(), surroundings.set(PASS):
        for layer in range(NUM_LAYERS):
            x = x + Ffn(layer, surroundings)(x)
    return x


def rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (num_rows, WIDTH), generator=numbers).float()


@contextmanager
def group(run_dir: Path, num_ranks: int = 2, timeout_seconds: float = 10.0) -> Iterator[list[Rank]]:
    """Ranks that ship all batches of up to 16 rows. Layer l is rank l % d's."""
    parts = []
    for share in make_shares(num_ranks, "streamed", 1, ship_below_rows=100):
        surroundings = Surroundings()
        turns = Turns(surroundings.set)
        blocks = [Block(layer, surroundings) for layer in range(NUM_LAYERS)]
        options = PoolOptions(
            run_dir=run_dir,
            turns=turns,
            peer_timeout_seconds=5,
            ship_timeout_seconds=timeout_seconds,
        )
        loader = PoolLoader(share, SharedMemoryStore(run_dir, share.rank), options)
        for block in blocks:
            loader.add_block(block)
        parts.append((surroundings, turns, blocks, loader))
    with ExitStack() as stack:
        pools = all_at_once([loader.attach for *_, loader in parts])
        ranks = [Rank(*part[:3], pool) for part, pool in zip(parts, pools, strict=True)]
        for pool in pools:
            stack.callback(pool.close)
            pool.start()
        yield ranks


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_owners_that_ship_to_each_other_at_once(tmp_path: Path, num_ranks: int) -> None:
    """Each waits for the others in most of its layers, amid its pass, and serves them there."""
    with group(tmp_path, num_ranks) as ranks:

        def compute(number: int) -> None:
            for seed in range(40):
                x = rows(1 + (seed + number) % 5, seed)
                assert torch.equal(ranks[number].run(x), plain(x))

        all_at_once([partial(compute, number) for number in range(num_ranks)])
        stats = [rank.pool.stats() for rank in ranks]
        assert [one.shipped_iterations for one in stats] == [40] * num_ranks
        assert sum(one.served_rows for one in stats) == sum(one.shipped_rows for one in stats) > 0
        assert all(rank.surroundings.current is None for rank in ranks)


def test_an_idle_owner_serves_on_its_thread(tmp_path: Path) -> None:
    with group(tmp_path) as (idle, busy):
        x = rows(3)
        assert torch.equal(busy.run(x), plain(x))
        assert [(layer, n) for layer, n, _ in idle.surroundings.served] == [(0, 3), (2, 3), (4, 3)]
        assert {one for *_, one in idle.surroundings.served}.isdisjoint({threading.main_thread()})
        assert idle.surroundings.current is None


def test_an_owner_in_a_long_layer_serves_after_it(tmp_path: Path) -> None:
    """Not beside the layer, nor only after the pass: as soon as the layer has ended."""
    with group(tmp_path) as (owner, peer):
        in_layer, end_layer, end_pass = threading.Event(), threading.Event(), threading.Event()

        def linger() -> None:
            in_layer.set()
            assert end_layer.wait(10)

        owner.blocks[0].mlp.before = linger
        outs: dict[str, torch.Tensor] = {}

        def stay(layer: int) -> None:
            assert layer > 0 or end_pass.wait(10)

        of_owner = threading.Thread(target=lambda: outs.update(owner=owner.run(rows(2), stay)))
        of_peer = threading.Thread(target=lambda: outs.update(peer=peer.run(rows(4, 1))))
        of_owner.start()
        assert in_layer.wait(10)
        of_peer.start()
        time.sleep(0.2)  # what is to be seen is that nothing happens
        assert owner.surroundings.served == []
        end_layer.set()
        until(lambda: owner.surroundings.served != [])
        assert owner.surroundings.served == [(0, 4, of_owner)]
        end_pass.set()
        of_owner.join(10)
        of_peer.join(10)
        assert torch.equal(outs["owner"], plain(rows(2)))
        assert torch.equal(outs["peer"], plain(rows(4, 1)))


@pytest.mark.parametrize("where", ["between layers", "in a layer", "in a layer shipped"])
def test_a_pass_cut_short_leaves_its_turn(tmp_path: Path, where: str) -> None:
    with group(tmp_path) as (owner, peer):

        def fail(_: object = None) -> None:
            raise ZeroDivisionError

        if where == "between layers":
            with pytest.raises(ZeroDivisionError):
                owner.run(rows(2), fail)
        elif where == "in a layer":
            owner.blocks[0].mlp.before = fail
            with pytest.raises(ZeroDivisionError):
                owner.run(rows(2))
            owner.blocks[0].mlp.before = lambda: None
        else:
            with pytest.raises(PoolError, match="rank 1 failed to run layer 1 for rank 0"):
                owner.run(rows(2), partial(_spoil, peer))
            peer.blocks[1].mlp.layer = 1
        for rank in (peer, owner):
            assert torch.equal(rank.run(rows(3)), plain(rows(3)))


def _spoil(peer: Rank, _: int) -> None:
    """Have the peer's layer fail."""
    del peer.blocks[1].mlp.layer


def test_a_peer_that_ends_amid_a_pass(tmp_path: Path) -> None:
    """Its layers are read where they lie, in the surroundings of the pass."""
    with group(tmp_path) as (mine, ends):

        def end(layer: int) -> None:
            if layer == 1:
                ends.pool.close()

        assert torch.equal(mine.run(rows(3), end), plain(rows(3)))
        assert torch.equal(mine.run(rows(2)), plain(rows(2)))
        assert mine.pool.stats().shipped_rows == 3, "those of layer 1 alone"


def test_an_owner_that_never_gives_its_turn_is_named(tmp_path: Path) -> None:
    with group(tmp_path, timeout_seconds=0.3) as (owner, peer):
        with owner.turns.forward_pass():
            failure = all_at_once([partial(_failure_of, peer)])[0]
        assert "rank 0 did not run layer 0 for rank 1 within 0.3 s" in failure


def _failure_of(rank: Rank) -> str:
    with pytest.raises(PoolError) as caught:
        rank.run(rows(1))
    return str(caught.value)


def test_a_pool_closes_within_a_pass(tmp_path: Path) -> None:
    with group(tmp_path) as (mine, _), mine.turns.forward_pass():
        mine.pool.close()


def test_those_that_asked_first_are_served_first(tmp_path: Path) -> None:
    """Three borrowers of two layers: one pass for each layer, in the order of the first calls."""
    turns, ran = Turns(), list[int]()

    def record(layer: int, x: torch.Tensor) -> torch.Tensor:
        ran.append(layer)
        return forward_of(layer)(x)

    layers = {layer: (partial(record, layer), torch.float32) for layer in (0, 3)}
    mailbox = partial(shared_mailbox, tmp_path)
    with ExitStack() as stack:
        stack.callback(os.close, hold_lock(alive_path(tmp_path, 0)))
        borrowers = [stack.enter_context(shipper(tmp_path, rank)) for rank in (2, 3, 4)]
        owner = ShipServer(tmp_path, 0, 5, BUFFER_BYTES, layers, mailbox, turns=turns)
        owner.start()
        stack.callback(owner.close)
        asked = list(zip(borrowers, (3, 0, 0), strict=True))
        with turns.forward_pass():
            owner.serve_waiting()
            assert owner.passes == 0
            calls = []
            for one, layer in asked:
                calls.append(one.start(0, layer, torch.ones(2, COLUMNS)))
                time.sleep(0.05)
            owner.serve_waiting()
            assert ran == [3, 0]
        assert (owner.passes, owner.served_calls, owner.served_rows) == (2, 3, 6)
        for (one, layer), call in zip(asked, calls, strict=True):
            assert torch.equal(one.wait(call), forward_of(layer)(torch.ones(2, COLUMNS)))


def test_ranks_that_wait_for_each_other_take_no_turns() -> None:
    sums = TensorParallel(lambda module: module.forward, lambda x: x)
    with pytest.raises(PoolError):
        PoolOptions(turns=Turns(), tensor_parallel=sums)
