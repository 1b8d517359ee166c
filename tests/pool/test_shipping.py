"""Rows that travel to a layer's owner come back as if they had been computed at home."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.pool.layer import Forward
from elbowroom.pool.run_dir import hold_lock
from elbowroom.pool.serving import ShipServer
from elbowroom.pool.shared_memory import alive_path, shared_mailbox
from elbowroom.pool.shipping import Shipper

COLUMNS = 64
MOST_ROWS = 256
BUFFER_BYTES = MOST_ROWS * COLUMNS * 4
NUM_LAYERS = 6


def weight(layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)


def forward_of(layer: int, delay_seconds: float = 0.0) -> Forward:
    """A row comes out the same in any batch: float64 products, summed column by column."""
    matrix = weight(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        time.sleep(delay_seconds)
        out = torch.zeros(x.shape[0], COLUMNS, dtype=torch.float64)
        for column in range(COLUMNS):
            out += x[:, column : column + 1].double() * matrix[column]
        return out.float()

    return forward


@contextmanager
def server(
    run_dir: Path, rank: int, num_ranks: int = 3, delay_seconds: float = 0.0
) -> Iterator[ShipServer]:
    """An owner of layers r, r + d, ... that is alive."""
    lock = hold_lock(alive_path(run_dir, rank))
    layers = {
        layer: (forward_of(layer, delay_seconds), torch.float32)
        for layer in range(rank, NUM_LAYERS, num_ranks)
    }
    mailbox = partial(shared_mailbox, run_dir)
    one = ShipServer(run_dir, rank, num_ranks, BUFFER_BYTES, layers, mailbox)
    one.start()
    try:
        yield one
    finally:
        one.close()
        os.close(lock)


@contextmanager
def shipper(run_dir: Path, rank: int, timeout_seconds: float = 20.0) -> Iterator[Shipper]:
    one = Shipper(run_dir, rank, BUFFER_BYTES, partial(shared_mailbox, run_dir), timeout_seconds)
    try:
        yield one
    finally:
        one.close()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("owners", ["idle", "busy", "slow"])
def test_shipped_equals_local(tmp_path: Path, num_ranks: int, owners: str) -> None:
    """200 batches of 1 to 256 rows from every rank, all ranks at once."""
    delay = 0.002 if owners == "slow" else 0.0
    failures: list[str] = []
    is_over = threading.Event()

    def borrow(rank: int, mine: Shipper) -> None:
        chance = random.Random(rank)
        for number in range(200):
            layer = chance.choice([n for n in range(NUM_LAYERS) if n % num_ranks != rank])
            x = torch.randn(chance.choice((1, 2, 7, 64, 256, chance.randint(1, 256))), COLUMNS)
            out = mine.wait(mine.start(layer % num_ranks, layer, x))
            if not torch.equal(out, forward_of(layer)(x)):
                failures.append(f"rank {rank}, batch {number}, layer {layer}, {len(x)} rows")

    def compute() -> None:
        while not is_over.is_set():
            torch.randn(200, 200) @ torch.randn(200, 200)

    with ExitStack() as stack:
        ranks = range(num_ranks)
        servers = [stack.enter_context(server(tmp_path, r, num_ranks, delay)) for r in ranks]
        mine = [stack.enter_context(shipper(tmp_path, rank)) for rank in ranks]
        borrowers = [threading.Thread(target=borrow, args=(r, mine[r])) for r in ranks]
        busy = [threading.Thread(target=compute)] if owners == "busy" else []
        for thread in (*borrowers, *busy):
            thread.start()
        for thread in borrowers:
            thread.join()
        is_over.set()
    assert not failures
    assert sum(one.served_calls for one in servers) >= sum(one.passes for one in servers) > 0


def test_calls_that_wait_are_run_in_one_pass(tmp_path: Path) -> None:
    with ExitStack() as stack:
        owner = stack.enter_context(server(tmp_path, 0, delay_seconds=0.3))
        borrowers = [stack.enter_context(shipper(tmp_path, rank)) for rank in (1, 2)]
        blocker = stack.enter_context(shipper(tmp_path, 3))
        first = blocker.start(0, 3, torch.ones(1, COLUMNS))
        time.sleep(0.1)  # the owner is at work when two more calls come
        x = [torch.randn(rows, COLUMNS) for rows in (3, 5)]
        calls = [one.start(0, 3, rows) for one, rows in zip(borrowers, x, strict=True)]
        outs = [one.wait(call) for one, call in zip(borrowers, calls, strict=True)]
        blocker.wait(first)
        assert (owner.served_calls, owner.passes, owner.served_rows) == (3, 2, 9)
        for out, rows in zip(outs, x, strict=True):
            assert torch.equal(out, forward_of(3)(rows))


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    with server(tmp_path, 0), shipper(tmp_path, 1) as mine:
        first = mine.wait(mine.start(0, 0, torch.ones(2, COLUMNS)))
        kept = first.clone()
        mine.wait(mine.start(0, 3, torch.randn(2, COLUMNS)))
        assert torch.equal(first, kept)


def test_an_owner_that_is_not_there(tmp_path: Path) -> None:
    with (
        shipper(tmp_path, 1) as mine,
        pytest.raises(PeerLostError, match="rank 0 died before it ran layer 3"),
    ):
        mine.start(0, 3, torch.ones(1, COLUMNS))


def test_an_owner_that_takes_too_long(tmp_path: Path) -> None:
    with server(tmp_path, 0, delay_seconds=0.6), shipper(tmp_path, 1, 0.2) as mine:
        call = mine.start(0, 3, torch.ones(1, COLUMNS))
        with pytest.raises(PoolError, match=r"rank 0 did not run layer 3 for rank 1 within 0.2 s"):
            mine.wait(call)
        mine._timeout_seconds = 20
        x = torch.randn(2, COLUMNS)
        again = mine.wait(mine.start(0, 0, x))
        assert torch.equal(again, forward_of(0)(x)), "the late answer was not taken for this one"


def test_a_layer_that_the_owner_does_not_have(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with server(tmp_path, 0), shipper(tmp_path, 1) as mine:
        call = mine.start(0, 1, torch.ones(1, COLUMNS))
        with pytest.raises(PoolError, match="rank 0 failed to run layer 1 for rank 1"):
            mine.wait(call)
        assert "layer 1 failed" in capfd.readouterr().out
        x = torch.randn(2, COLUMNS)
        assert torch.equal(mine.wait(mine.start(0, 0, x)), forward_of(0)(x)), "it serves on"


def test_either_end_can_be_started_again(tmp_path: Path) -> None:
    x = torch.randn(4, COLUMNS)
    with shipper(tmp_path, 1) as mine:
        with server(tmp_path, 0):
            assert torch.equal(mine.wait(mine.start(0, 0, x)), forward_of(0)(x))
        with pytest.raises(PeerLostError):
            mine.start(0, 0, x)
        with server(tmp_path, 0):
            assert torch.equal(mine.wait(mine.start(0, 0, x)), forward_of(0)(x))
    with server(tmp_path, 0):
        for _ in range(2):
            with shipper(tmp_path, 1) as mine:
                assert torch.equal(mine.wait(mine.start(0, 3, x)), forward_of(3)(x))


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(n, marks=pytest.mark.nightly) for n in range(6, 30))]
)
def test_an_owner_that_is_killed_while_borrowers_wait(tmp_path: Path, seed: int) -> None:
    """Each gets its rows or a typed error within a second of the death, and none hangs."""
    chance = random.Random(seed)
    command = (sys.executable, "-m", "tests.pool.member", "serve", str(tmp_path), "0")
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "done\n"
        outcomes: list[str] = []
        ended_at: list[float] = []

        def borrow(rank: int) -> None:
            with shipper(tmp_path, rank) as mine:
                try:
                    while True:
                        x = torch.randn(3, COLUMNS)
                        out = mine.wait(mine.start(0, 0, x))
                        outcomes.append("right" if torch.equal(out, forward_of(0)(x)) else "wrong")
                except PeerLostError:
                    outcomes.append("lost")
                ended_at.append(time.monotonic())

        threads = [threading.Thread(target=borrow, args=(rank,)) for rank in (1, 2)]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0, 0.1))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        killed_at = time.monotonic()
        for thread in threads:
            thread.join(10)
        assert outcomes.count("lost") == 2
        assert "wrong" not in outcomes
        assert max(ended_at) - killed_at < 5
    finally:
        owner.kill()
        owner.communicate()
