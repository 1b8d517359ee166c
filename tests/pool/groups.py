"""Groups of pools on one small model, each rank in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import FetchOrder, PoolMode, PoolShare
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.pool import Pool
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.pool.store import LocalHub, LocalStore, Store
from elbowroom.pool.turns import Turns
from tests.pool.hf import blocks_of, make_model

Result = TypeVar("Result")
NUM_LAYERS = 5  # divisible by neither 2 nor 3
TOKENS = torch.arange(12).reshape(2, 6)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def make_shares(
    num_ranks: int,
    mode: PoolMode,
    slots: int | None = None,
    order: FetchOrder = "peak-shift",
    ship_below_rows: int = 0,
    ship_rows: int = 16,
) -> tuple[PoolShare, ...]:
    ship_bytes = ship_rows * 32 * 4 if ship_below_rows else 0
    return plan_shares(
        (1,) * NUM_LAYERS,
        num_ranks,
        mode,
        slots,
        order,
        ship_bytes=ship_bytes,
        ship_below_rows=ship_below_rows,
    )


@contextmanager
def make_group(
    shares: tuple[PoolShare, ...],
    name: str = "llama",
    run_dir: Path | None = None,
    in_turns: bool = False,
) -> Iterator[tuple[list[nn.Module], list[Pool]]]:
    """One model per rank, pooled and started; in shared memory if a run directory is given."""
    hub = LocalHub()
    models = [make_model(name, NUM_LAYERS) for _ in shares]
    loaders = []
    for share, model in zip(shares, models, strict=True):
        options = PoolOptions(
            run_dir=run_dir,
            peer_timeout_seconds=5,
            stream_timeout_seconds=5,
            turns=Turns() if in_turns else None,
        )
        store = SharedMemoryStore(run_dir, share.rank) if run_dir else LocalStore(hub)
        loaders.append(make_loader(share, store, model, options))
    with ExitStack() as stack:
        pools = all_at_once([loader.attach for loader in loaders])
        for pool in pools:
            stack.callback(pool.close)
            pool.start()
        yield models, pools


def make_loader(
    share: PoolShare, store: Store, model: nn.Module, options: PoolOptions | None = None
) -> PoolLoader:
    """A loader that has all blocks of ``model``."""
    loader = PoolLoader(share, store, options)
    for block in blocks_of(model):
        loader.add_block(block)
    return loader


def all_at_once(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each call gives, all on threads of their own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(20) for future in [threads.submit(call) for call in calls]]
