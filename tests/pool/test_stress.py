"""Random batches, modes and slow peers for a long time: nothing is wrong, and nothing grows."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from elbowroom.pool.pool import Pool
from tests.pool.groups import NUM_LAYERS, make_group, make_shares
from tests.pool.hf import blocks_of, make_model

NUM_RANKS, MOST_TOKENS = 3, 60
WARM_UP_SECONDS = 5.0
GROWTH_BYTES = 32 * 1024**2


def _stress(run_dir: Path, seconds: float, in_turns: bool = False) -> None:
    plain = make_model("llama", NUM_LAYERS)
    with torch.inference_mode():
        expected = {n: plain(torch.arange(n)[None]).logits for n in range(1, MOST_TOKENS + 1)}
    shares = make_shares(NUM_RANKS, "streamed", 1, ship_below_rows=20, ship_rows=40)
    with make_group(shares, run_dir=run_dir, in_turns=in_turns) as (models, pools):
        for block in blocks_of(models[2]):  # slow now and then, for itself and for others
            block.get_submodule("mlp.gate_proj").register_forward_pre_hook(
                lambda *_: time.sleep(random.choice((0, 0, 0, 0, 3e-3)))
            )
        _compute_for(seconds, models, pools, expected)


def _compute_for(
    seconds: float, models: list[nn.Module], pools: list[Pool], expected: dict[int, torch.Tensor]
) -> None:
    failures: list[str] = []
    counts = [0] * NUM_RANKS
    end = time.monotonic() + seconds

    def compute(rank: int) -> None:
        chance = random.Random(rank)
        try:
            with torch.inference_mode():
                while time.monotonic() < end and not failures:
                    near = chance.choice((2, 18, 22, 50))  # small, around the threshold, too large
                    for _ in range(chance.randint(1, 60)):
                        num_tokens = max(1, min(MOST_TOKENS, near + chance.randint(-4, 4)))
                        out = models[rank](torch.arange(num_tokens)[None]).logits
                        torch.testing.assert_close(out, expected[num_tokens], rtol=1e-3, atol=1e-4)
                        counts[rank] += 1
                    pools[rank].check_integrity()
                    time.sleep(chance.choice((0, 0, 0, 0.05, 0.2)))
        except Exception as error:
            failures.append(f"rank {rank}: {error!r}")

    gc.collect()  # files that other tests have left must not be closed meanwhile
    process = psutil.Process()
    held: list[tuple[int, int]] = []

    def watch() -> None:
        time.sleep(min(WARM_UP_SECONDS, seconds / 2))
        while time.monotonic() < end and not failures:
            held.append((process.memory_info().rss, process.num_fds()))
            time.sleep(0.5)

    _on_threads([watch, *(lambda rank=rank: compute(rank) for rank in range(NUM_RANKS))])
    stats = [pool.stats() for pool in pools]
    assert not failures
    assert min(counts) > 0
    for of_rank in stats:
        assert of_rank.streamed_iterations > 0
        assert of_rank.shipped_iterations > 0
        assert of_rank.served_rows > 0
    assert sum(s.served_rows for s in stats) == sum(s.shipped_rows for s in stats)
    assert max(rss for rss, _ in held) - held[0][0] < GROWTH_BYTES
    assert len({num_fds for _, num_fds in held}) == 1


def _on_threads(calls: list[object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("in_turns", [False, True])
def test_some_seconds(tmp_path: Path, in_turns: bool) -> None:
    _stress(tmp_path, 6.0, in_turns)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_ten_minutes(tmp_path: Path) -> None:
    _stress(tmp_path, float(os.environ.get("ELBOWROOM_STRESS_SECONDS", "600")))
