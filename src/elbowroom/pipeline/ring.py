"""Ring all-reduce of a tensor: each worker sends to its neighbour only, all equally much.

Of m parts each goes round twice, to be added up and to be handed out: 2(m-1)/m of the tensor from
each worker, the least there is (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed


class Ring:
    """One worker's place in a ring of ``workers``: each sends to the next, the last to the first.

    ``sent_bytes[w]`` counts parts of tensors sent to w. Every worker of the ring must call the same
    methods in the same order, which raise RuntimeError when a neighbour is gone.
    """

    def __init__(self, workers: Sequence[int], worker: int) -> None:
        self._size, self._place = len(workers), workers.index(worker)
        self._next = workers[(self._place + 1) % self._size]
        self._previous = workers[self._place - 1]
        self._spares: dict[torch.dtype, torch.Tensor] = {}
        self.sent_bytes: dict[int, int] = {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that parts are received in, to be added."""
        return sum(spare.nbytes for spare in self._spares.values())

    def add_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """The sums of all workers' counts. Like headers, they are not counted as sent."""
        total = given = counts
        for _ in range(self._size - 1):
            taken = torch.empty_like(given)
            receiving = _receive(taken, self._previous)
            _send(given, self._next).wait()
            receiving.wait()
            total, given = total + taken, taken
        return total

    def average(self, tensor: torch.Tensor, divisor: int = 1) -> None:
        """Replace ``tensor`` by the sum of all workers', over ``divisor``; the same bits on all.

        Of one dimension, as long on each worker. Its parts differ by one element at most; all
        workers together send 2(m-1) times the tensor. Part p is added up from worker p on, and
        divided by the last one. What is received is never written where something is still to be
        sent: it comes from workers that have had that.
        """
        num_added = self._size - 1
        parts = tensor.tensor_split(self._size)
        places = [(self._place - 1 - step) % self._size for step in range(2 * num_added)]
        spares = self._spare(tensor).tensor_split(self._size)
        landings = [spares[place] for place in places[:num_added]]
        landings += [parts[place] for place in places[num_added:]]
        receivings = [_receive(landing, self._previous) for landing in landings]
        sendings = [self._give(parts[self._place])]
        for step, place in enumerate(places):
            receivings[step].wait()
            if step < num_added:
                parts[place].add_(spares[place])
            if step == num_added - 1:
                parts[place].div_(divisor)
            if step != 2 * num_added - 1:
                sendings.append(self._give(parts[place]))
        for sending in sendings:
            sending.wait()

    def _give(self, part: torch.Tensor) -> distributed.Work:
        self.sent_bytes[self._next] = self.sent_bytes.get(self._next, 0) + part.nbytes
        return _send(part, self._next)

    def _spare(self, like: torch.Tensor) -> torch.Tensor:
        """Memory as large as ``like``, the same at each call if it suffices."""
        spare = self._spares.get(like.dtype)
        if spare is None or len(spare) < len(like):
            spare = self._spares[like.dtype] = torch.empty_like(like)
        return spare[: len(like)]


def _send(tensor: torch.Tensor, worker: int) -> distributed.Work:
    work = distributed.isend(tensor, worker)
    assert work is not None, "this process is in the group"
    return work


def _receive(tensor: torch.Tensor, worker: int) -> distributed.Work:
    work = distributed.irecv(tensor, worker)
    assert work is not None, "this process is in the group"
    return work
