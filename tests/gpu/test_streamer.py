"""Layers streamed within one GPU, in passes with and without a CUDA graph, in one process."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from elbowroom.pool.streamer import DeviceStreamer
from tests.pool.streamed import FETCHES, LAYERS, NUM_LAYERS, published, run_plainly, run_streamed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

WIDTH, NUM_ROWS = 2048, 64


class _Stack(NamedTuple):
    """Products one after the other; those of ``LAYERS`` come through the streamer."""

    weights: torch.Tensor
    streamer: DeviceStreamer

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return run_streamed(self.streamer, self.weights, x)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return run_plainly(self.weights, x)


def _stack(num_slots: int) -> _Stack:
    torch.manual_seed(0)
    size = (NUM_LAYERS, WIDTH, WIDTH)
    weights = (torch.randn(size, device="cuda") / WIDTH**0.5).to(torch.bfloat16)
    streamer = DeviceStreamer(FETCHES, published(weights), num_slots, torch.device("cuda"))
    torch.cuda.synchronize()  # sources are published before anybody streams them
    streamer.start()
    return _Stack(weights, streamer)


@torch.inference_mode()
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_replays_and_passes_without_a_graph_may_follow_each_other(num_slots: int) -> None:
    stack = _stack(num_slots)
    x = torch.randn(NUM_ROWS, WIDTH, device="cuda").to(torch.bfloat16)
    stack.run(x)  # as engines do before they capture
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        stack.streamer.sync()
        with torch.cuda.graph(graph):
            out = stack.run(x)
            stack.streamer.join()
        graphs.append((graph, out))
    order = random.Random(num_slots)
    for _ in range(200):
        x.copy_(torch.randn(NUM_ROWS, WIDTH, device="cuda"))
        choice = order.randrange(3)
        if choice < 2:
            stack.streamer.sync()
            graphs[choice][0].replay()
            out = graphs[choice][1]
        else:
            out = stack.run(x)
        assert torch.equal(out, stack.expected(x))
    stack.streamer.close()


@torch.inference_mode()
def test_bytes_count_passes_that_ran() -> None:
    stack = _stack(2)
    x = torch.randn(NUM_ROWS, WIDTH, device="cuda").to(torch.bfloat16)
    before = stack.streamer.streamed_bytes
    graph = torch.cuda.CUDAGraph()
    stack.streamer.sync()
    with torch.cuda.graph(graph):
        stack.run(x)
        stack.streamer.join()
    assert stack.streamer.streamed_bytes == before
    stack.streamer.sync()
    graph.replay()
    assert stack.streamer.streamed_bytes == before + len(LAYERS) * 2 * WIDTH**2
    stack.streamer.close()
