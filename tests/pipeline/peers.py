"""One of some processes that talk to each other, for tests.

python -m tests.pipeline.peers NAME FOLDER WORKER SIZE
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from elbowroom.pipeline.links import Links, Side
from elbowroom.pipeline.replicas import Replicas
from elbowroom.pipeline.ring import Ring


def lets_go_of_what_was_sent(number: int, size: int) -> None:
    """Long before the end, while others are sent."""
    links, other = Links([Side([1 - number], 1)], ahead=20), 1 - number
    memory = [np.full(50, float(k)) for k in range(20)]
    for array in memory:
        links.send(other, (torch.from_numpy(array),))
    for array in memory:
        message = links.receive(other)
        assert torch.equal(message.tensors[0], torch.from_numpy(array))
        links.give_back(other, message)
    sent = [weakref.ref(array) for array in memory]
    del memory, array
    for _ in range(50):
        links.send(other, ())
        links.receive(other)
        time.sleep(0.01)
    assert all(array() is None for array in sent)
    links.close()


def receives_no_more_than_it_may(number: int, size: int) -> None:
    """Two messages ahead, and those that come later lie where earlier ones did."""
    links, other = Links([Side([1 - number], 3)], ahead=2), 1 - number
    shapes = ((3,), (5, 7))
    message_bytes = sum(torch.empty(shape).nbytes for shape in shapes)
    for k in range(6):
        links.send(other, [torch.full(shape, float(k)) for shape in shapes])
    time.sleep(0.2)
    places = set()
    for k in range(6):
        message = links.receive(other)
        assert [tensor.unique().tolist() for tensor in message.tensors] == [[k], [k]]
        assert links.buffer_bytes == 3 * message_bytes
        places.add(message.tensors[1].data_ptr())
        links.give_back(other, message)
    assert len(places) <= 3
    links.close()


def adds_up_in_a_ring(number: int, size: int) -> None:
    """Of any length, part p from worker p on; each part moves 2(m-1) times."""
    ring, workers = Ring(range(size), number), range(size)
    for length in (0, 1, 2, 3, 50, 1000):
        generator = torch.Generator().manual_seed(length)
        given = torch.randn(size, length, dtype=torch.float64, generator=generator)
        parts = given.tensor_split(size, dim=1)
        orders = [[(p + step) % size for step in workers] for p in workers]
        sums = [reduce(torch.add, [parts[p][k] for k in orders[p]]) for p in workers]
        tensor, before = given[number].clone(), sum(ring.sent_bytes.values())
        divisor = ring.add_counts(number + 1)
        ring.average(tensor, divisor)
        assert divisor == size * (size + 1) // 2
        assert torch.equal(tensor, torch.cat(sums) / divisor)
        assert list(ring.sent_bytes) == [(number + 1) % size]
        sent = ring.add_counts(sum(ring.sent_bytes.values()) - before)
        assert sent == 2 * (size - 1) * tensor.nbytes


def agrees(number: int, size: int) -> None:
    """Gradients leave while autograd is at work; rounds end also with one minibatch in all."""
    unused, a, b = torch.ones(2), torch.full((4,), 2.0), torch.full((6,), 3.0)
    leaves = {"unused": unused, "a": a, "b": b}
    for leaf in leaves.values():
        leaf.requires_grad_()
    replicas = Replicas(range(size), number, leaves, bucket_bytes=16)
    replicas.tell(1)
    with replicas.watch(leaves):
        loss = (number + 1) * (a.square().sum() + b.square().sum())
        torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    _await(lambda: sum(replicas.sent_bytes.values()) == a.nbytes + b.nbytes)
    agreed = replicas.agree({"unused": torch.full((2,), float(number))})
    assert list(agreed) == list(leaves)
    assert [one.unique().tolist() for one in agreed.values()] == [[0.5], [6.0], [9.0]]
    replicas.tell(1 - number)
    agreed = replicas.agree({} if number else {"a": torch.full((4,), 5.0)})
    assert [one.unique().tolist() for one in agreed.values()] == [[0.0], [5.0], [0.0]]
    replicas.close()


def _await(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def main(name: str, folder: Path, number: int, size: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    distributed.init_process_group("gloo", init_method=meet, rank=number, world_size=size)
    globals()[name](number, size)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
