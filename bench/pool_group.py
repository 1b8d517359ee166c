"""Processes that hold stacks of decoder layers, with and without a pool, and time iterations.

    python -m bench.pool_group SETUP RANK RUN_DIR

is one of them: it reads a mode and a number of rows per line and answers with what it measured.
Each mode has a stack of its own; those of a pool share their feed-forward weights.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from bench.blocks import Block, KeysAndValues, Linear, Pack, Shape
from elbowroom.engine.vllm_seam.kernels import find_kernel
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.loading import PoolLoader
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.run_dir import run_directory
from elbowroom.pool.shared_memory import SharedMemoryStore
from elbowroom.pool.store import Store
from elbowroom.pool.turns import Turns

MODES = ("local", "streamed", "shipped")
TAKES_TURNS = ("shipped", "own")  # the layers that this rank owns, in the pool that ships
LEAST_SECONDS, LEAST_ITERATIONS = 1.0, 4
ALWAYS = 10**6


@dataclass(frozen=True)
class Setup:
    """What all processes of a group are told. ``cores[r]`` are those of rank r, if it has any."""

    shape: Shape
    num_layers: int
    num_ranks: int
    most_rows: int
    device: str = "cpu"
    cores: tuple[tuple[int, ...], ...] = ()
    num_slots: int = 1
    bytes_per_second: float = float("inf")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Setup:
        fields = json.loads(text)
        return Setup(**{**fields, "shape": Shape(*fields["shape"])})

    @property
    def buffer_bytes(self) -> int:
        return self.most_rows * self.shape.hidden * 2


@dataclass(frozen=True)
class Measured:
    """Median seconds of an iteration, and of the stack's first FFN that this rank owns.

    ``slow_ffn_seconds`` is what 19 of 20 passes of that FFN stay under.
    """

    seconds: float
    ffn_seconds: float
    slow_ffn_seconds: float


class Group:
    """The processes of a group, asked together."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def ask(self, *asked: tuple[str, int] | None) -> list[Measured]:
        """Rank r does ``asked[r]``, a mode and rows, while the others do theirs; None rests."""
        at_work = [(p, a) for p, a in zip(self._processes, asked, strict=True) if a is not None]
        for process, (mode, rows) in at_work:
            assert process.stdin is not None
            process.stdin.write(f"{mode} {rows}\n")
            process.stdin.flush()
        return [Measured(*json.loads(_line(process))) for process, _ in at_work]

    def seconds(self, mode: str, rows: int) -> float:
        """Seconds of an iteration, the mean of all ranks at work at once."""
        asked = [(mode, rows)] * len(self._processes)
        return statistics.mean(one.seconds for one in self.ask(*asked))


@contextmanager
def group(setup: Setup) -> Iterator[Group]:
    """A group that is ready. Ends its processes."""
    with run_directory() as run_dir:
        processes = [_start(setup, rank, run_dir) for rank in range(setup.num_ranks)]
        try:
            for process in processes:
                assert _line(process) == "ready\n"
            yield Group(processes)
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def _start(setup: Setup, rank: int, run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.pool_group", setup.to_json(), str(rank), str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def work(setup: Setup, rank: int, run_dir: Path) -> None:
    """Answer each line with the fields of ``Measured``."""
    if setup.cores:
        os.sched_setaffinity(0, setup.cores[rank])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device(setup.device):
        kv = make_kv(setup)
        # As the engine has it: on a CPU what is served and passes take turns, on a device nothing.
        turns = Turns() if setup.device == "cpu" else None
        stacks = {mode: make_stack(setup, mode, rank, run_dir, kv, turns) for mode in MODES}
        stacks["own"] = stacks["shipped"][rank :: setup.num_ranks]
        print("ready", flush=True)
        for line in sys.stdin:
            mode, rows = line.split()
            passes = turns.forward_pass if turns and mode in TAKES_TURNS else nullcontext
            own = stacks[mode][0 if mode == "own" else rank]
            measured = measure(stacks[mode], int(rows), setup, own.mlp, passes)
            print(json.dumps([*asdict(measured).values()]), flush=True)


def make_kv(setup: Setup) -> list[KeysAndValues]:
    """Weights of every layer; the stacks share them."""
    shape = setup.shape
    size = (setup.most_rows, shape.num_kv_heads, shape.context, shape.head_dim)
    empty = partial(torch.empty, size, dtype=torch.bfloat16)
    return [(empty().normal_(), empty().normal_()) for _ in range(setup.num_layers)]


def make_stack(
    setup: Setup,
    mode: str,
    rank: int,
    run_dir: Path,
    kv: Sequence[KeysAndValues],
    turns: Turns | None,
) -> list[Block]:
    """Decoder layers that take their feed-forward weights from a pool of one or of all."""
    pack, linear = kernel(setup.device)
    folder = run_dir / (f"{mode}-{rank}" if mode == "local" else mode)
    folder.mkdir(exist_ok=True)
    loader = PoolLoader(
        _share(setup, mode, rank),
        open_store(setup.device, folder, rank),
        PoolOptions(
            folder,
            link_bytes_per_second=setup.bytes_per_second,
            turns=turns if mode in TAKES_TURNS else None,
        ),
    )
    blocks = []
    for layer in range(setup.num_layers):  # one after the other: a stack may not fit twice
        torch.manual_seed(layer)  # all ranks have the same model
        blocks.append(Block(setup.shape, linear, pack, kv[layer]))
        loader.add_block(blocks[-1])
    loader.attach().start()
    return blocks


def open_store(device: str, folder: Path, rank: int) -> Store:
    if device == "cpu":
        return SharedMemoryStore(folder, rank)
    from elbowroom.pool.cuda import CudaStore

    return CudaStore(folder, rank, torch.device(device, torch.cuda.current_device()))


def kernel(device: str) -> tuple[Pack, Linear]:
    """On a CPU the engine's own."""
    if device != "cpu":
        return (lambda weight: weight), functional.linear
    pack, linear = find_kernel()
    return (lambda weight: pack(weight).view(weight.shape)), linear


def _share(setup: Setup, mode: str, rank: int) -> PoolShare:
    ships = mode == "shipped"
    num_ranks = 1 if mode == "local" else setup.num_ranks
    shares = plan_shares(
        (1,) * setup.num_layers,
        num_ranks,
        "streamed",
        setup.num_slots,
        ship_bytes=setup.buffer_bytes if ships else 0,
        ship_below_rows=ALWAYS if ships else 0,
    )
    return shares[rank % num_ranks]


def measure(
    blocks: Sequence[Block],
    rows: int,
    setup: Setup,
    own: nn.Module,
    passes: Callable[[], AbstractContextManager[None]],
) -> Measured:
    """Iterations for a second, of which the first is dropped, with a clock around ``own``."""
    x = torch.randn(rows, setup.shape.hidden).to(torch.bfloat16)
    iterations: list[float] = []
    ffns: list[float] = []
    forward = own.forward
    own.forward = partial(_timed, forward, ffns, setup.device)
    while len(iterations) < LEAST_ITERATIONS or sum(iterations) < LEAST_SECONDS:
        begin = time.perf_counter()
        y = x
        with passes():
            for block in blocks:
                y = block(y)
        finish(setup.device)
        iterations.append(time.perf_counter() - begin)
    own.forward = forward
    slow = sorted(ffns[1:])[len(ffns[1:]) * 19 // 20]
    return Measured(statistics.median(iterations[1:]), statistics.median(ffns[1:]), slow)


def _timed(forward: nn.Module, seconds: list[float], device: str, x: torch.Tensor) -> torch.Tensor:
    """One FFN with a clock around it; a device is not waited for, as that would slow the rest."""
    begin = time.perf_counter()
    out: torch.Tensor = forward(x)
    seconds.append(time.perf_counter() - begin)
    return out


def finish(device: str) -> None:
    """Wait for all that was computed; a CPU has done it."""
    torch.get_device_module(device).synchronize()


if __name__ == "__main__":
    with torch.inference_mode():
        work(Setup.from_json(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
