"""One process of a group on a device: runs a pooled stack beside a local one and compares them.

    python -m tests.gpu.member RUN_DIR RANK NUM_RANKS MODE NUM_SLOTS NUM_BATCHES DEVICE

``DEVICE`` is PyTorch's name of one, or ``fake``: a CPU, whose memory is a store's by way of the
stand-in for CUDA's runtime, with the folder RUN_DIR/fake-gpu for a device.

Prints "ready", waits for a line, runs so many random batches and prints what it saw; waits again,
so that it serves others until it is told to end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from bench.blocks import Block, Shape
from bench.pool_group import ALWAYS, finish, kernel, open_store

from elbowroom.planning.pool.shares import plan_shares
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.store import Store
from tests.pool.fake_cudart import FakeRuntime, fake_folder, load_store

SHAPE = Shape(512, 1024, 8, 4, 64, 32)
NUM_LAYERS = 7
MOST_ROWS = 256 if torch.cuda.is_available() else 16


def main(
    run_dir: Path, rank: int, num_ranks: int, mode: str, num_slots: int, batches: int, store: Store
) -> None:
    device = store.device.type
    ships = mode == "shipped"
    share = plan_shares(
        (1,) * NUM_LAYERS,
        num_ranks,
        "mapped" if mode == "mapped" else "streamed",
        num_slots,
        ship_bytes=MOST_ROWS * SHAPE.hidden * 2 if ships else 0,
        ship_below_rows=ALWAYS if ships else 0,
    )[rank]
    local, pooled = _stack(device), _stack(device)
    options = PoolOptions(run_dir=run_dir)
    loader = PoolLoader(share, store, options)
    for block in pooled:
        loader.add_block(block)
    pool = loader.attach()
    pool.start()
    _tell("ready")
    errors = []
    generator = torch.Generator(device).manual_seed(rank)
    for batch in range(batches):
        rows = int(torch.randint(1, MOST_ROWS + 1, (1,), generator=generator, device=device))
        rows = rows if batch else 1  # few enough to be shipped, where rows are
        x = torch.randn(rows, SHAPE.hidden, generator=generator, device=device).to(torch.bfloat16)
        expected, out = _run(local, x), _run(pooled, x)
        errors.append(float((out - expected).float().norm() / expected.float().norm()))
        pool.check_integrity()
    finish(device)
    _tell(json.dumps({"worst": float(torch.tensor(errors).max()), "stats": vars(pool.stats())}))
    pool.close()


def _store(device: str, run_dir: Path, rank: int) -> Store:
    if device != "fake":
        return open_store(device, run_dir, rank)
    store: Store = load_store(FakeRuntime(fake_folder(run_dir))).CudaStore(
        run_dir, rank, torch.device("cpu")
    )
    return store


def _stack(device: str) -> list[Block]:
    """The same weights in every process."""
    torch.manual_seed(0)
    pack, linear = kernel(device)
    size = (MOST_ROWS, SHAPE.num_kv_heads, SHAPE.context, SHAPE.head_dim)
    kv = (torch.randn(size).to(torch.bfloat16), torch.randn(size).to(torch.bfloat16))
    return [Block(SHAPE, linear, pack, kv) for _ in range(NUM_LAYERS)]


def _run(blocks: list[Block], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


def _tell(line: str) -> None:
    print(line, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    folder, mode = Path(sys.argv[1]), sys.argv[4]
    rank, num_ranks, num_slots, batches = (int(sys.argv[n]) for n in (2, 3, 5, 6))
    torch.set_num_threads(1)  # where the device is a CPU, its cores are shared by all members
    store = _store(sys.argv[7], folder, rank)
    with torch.inference_mode(), torch.device(store.device):
        main(folder, rank, num_ranks, mode, num_slots, batches, store)
