"""One of some processes that talk to each other, for tests.

python -m tests.pipeline.peers NAME FOLDER WORKER SIZE
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import mse_loss

from elbowroom.core.errors import InputError, PeerLostError
from elbowroom.pipeline.links import Connection
from elbowroom.pipeline.options import StageOptions
from elbowroom.pipeline.pipeline import Pipeline
from elbowroom.pipeline.replicas import Replicas
from elbowroom.pipeline.ring import Ring
from elbowroom.training.ending import leave
from elbowroom.training.microbatch import Microbatch
from tests.pipeline.models import plan_of

_SHAPES = ((3,), (5, 7))


def lets_go_of_what_was_sent(number: int, size: int) -> None:
    """Long before the end, while others are sent."""
    link = Connection([1 - number], ahead=20, num_messages=1)
    memory = [np.full(50, float(k)) for k in range(20)]
    for k, array in enumerate(memory):
        link.send(k, (torch.from_numpy(array),))
    for k, array in enumerate(memory):
        message = link.receive(k)
        assert torch.equal(message.tensors[0], torch.from_numpy(array))
        link.give_back(message)
    sent = [weakref.ref(array) for array in memory]
    del memory, array
    for k in range(20, 70):
        link.send(k, ())
        link.receive(k)
        time.sleep(0.01)
    assert all(array() is None for array in sent)
    link.close()


def receives_no_more_than_it_may(number: int, size: int) -> None:
    """Two messages ahead, and those that come later lie where earlier ones did.

    Two workers take turns with minibatches in front of one that has the memory.
    """
    if number:
        link = Connection([0], stride=2)
        for k in range(number - 1, 12, 2):
            link.send(k, [torch.full(shape, float(k)) for shape in _SHAPES])
        link.close()
        return
    link = Connection([1, 2], ahead=2, num_messages=3)
    message_bytes = sum(torch.empty(shape).nbytes for shape in _SHAPES)
    places = set()
    for k in range(12):
        message = link.receive(k)
        time.sleep(0.05)
        assert [tensor.unique().tolist() for tensor in message.tensors] == [[k], [k]]
        assert link.buffer_bytes == 3 * message_bytes
        places.add(message.tensors[1].data_ptr())
        link.give_back(message)
    assert len(places) <= 3
    link.close()


def waits_until_no_more_are_unsent(number: int, size: int) -> None:
    """One worker reads what another sends only after a while."""
    link = Connection([1 - number])
    if number:
        time.sleep(0.3)
        for k in range(4):
            link.give_back(link.receive(k))
        link.close()
        return
    memory = [np.full(1 << 20, float(k)) for k in range(4)]
    held = [weakref.ref(array) for array in memory]
    while memory:
        link.send(len(held) - len(memory), (torch.from_numpy(memory.pop(0)),))
    assert all(array() is not None for array in held)
    link.wait_until_sent(but=1)
    assert sum(array() is not None for array in held) <= 1
    link.close()


def adds_up_in_a_ring(number: int, size: int) -> None:
    """Vectors of any length, part p from worker p on; each part moves 2(m-1) times."""
    ring, workers = Ring(range(size), number), range(size)
    for length in (0, 1, 2, 3, 50, 1000):
        generator = torch.Generator().manual_seed(length)
        given = torch.randn(size, length, dtype=torch.float64, generator=generator)
        parts = given.tensor_split(size, dim=1)
        orders = [[(p + step) % size for step in workers] for p in workers]
        sums = [reduce(torch.add, [parts[p][k] for k in orders[p]]) for p in workers]
        tensor, before = given[number].clone(), sum(ring.sent_bytes.values())
        divisor = int(ring.add_counts(torch.tensor(number + 1)))
        ring.average(tensor, divisor)
        assert divisor == size * (size + 1) // 2
        assert torch.equal(tensor, torch.cat(sums) / divisor)
        assert list(ring.sent_bytes) == [(number + 1) % size]
        sent = ring.add_counts(torch.tensor(sum(ring.sent_bytes.values()) - before))
        assert sent == 2 * (size - 1) * tensor.nbytes


def all_reduces(number: int, size: int) -> None:
    """Gradients leave while autograd is at work; rounds end also with one minibatch in all.

    What no replica has a gradient of has none; where one has, the others count as zeros.
    """
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
    reduced = replicas.all_reduce({"unused": torch.full((2,), float(number))})
    assert list(reduced) == list(leaves)
    assert [one.unique().tolist() for one in reduced.values()] == [[0.5], [6.0], [9.0]]
    replicas.tell(1 - number)
    reduced = replicas.all_reduce({} if number else {"a": torch.full((4,), 5.0)})
    assert {name: one.unique().tolist() for name, one in reduced.items()} == {"a": [5.0]}
    replicas.tell(1)
    reduced = replicas.all_reduce({} if number else {"a": torch.zeros(4)})
    assert {name: one.unique().tolist() for name, one in reduced.items()} == {"a": [0.0]}
    replicas.close()


def refuse_lists_together_that_differ(number: int, size: int) -> None:
    """In rows, in number or in sizes alone, before the first step."""
    pipeline = _pipeline()
    for lists in (((3, 1), (1, 3)), ((3, 1), (2, 1, 1))):
        with pytest.raises(InputError, match="another minibatch"):
            pipeline.train_step(_parts(*lists[number]))
    with pytest.raises(InputError, match="another minibatch"):
        pipeline.train_step(_parts(3, 1, num_tokens=7 + number))
    pipeline.train_step(_parts(3, 1))
    pipeline.close()


def hears_that_the_first_refused_its_list(number: int, size: int) -> None:
    """The first stage later has a list that is too long; its neighbour waits for it in vain."""
    _one_is_refused(number, refused=0)


def hears_that_the_last_refused_its_list(number: int, size: int) -> None:
    _one_is_refused(number, refused=1)


def _one_is_refused(number: int, refused: int) -> NoReturn:
    pipeline = _pipeline()
    pipeline.train_step(_parts(3, 1))
    distributed.barrier()  # what leaves at once would leave with gradients unsent
    if number == refused:
        with pytest.raises(InputError, match="a list of 3 microbatches"):
            pipeline.train_step(_parts(2, 1, 1))
    else:
        with pytest.raises(PeerLostError, match=f"worker {refused} ended"):
            pipeline.train_step(_parts(3, 1))
    leave(0)


def _pipeline() -> Pipeline:
    """Two linear layers on two workers, which take two microbatches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    options = StageOptions("flush", 2)
    optimizer_fn = partial(torch.optim.SGD, lr=0.1)
    return Pipeline(model, plan_of([["input", "0"], ["1"]]), optimizer_fn, mse_loss, options)


def _parts(*numbers: int, num_tokens: float | None = None) -> list[Microbatch]:
    """So many rows in each."""
    whole = torch.arange(4.0 * sum(numbers)).reshape(-1, 4).split(numbers)
    return [Microbatch(part[:, :3], part[:, 3:], num_tokens) for part in whole]


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
