"""Messages between the workers of a grid, point to point, counted by layer and direction."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import distributed

from elbowroom.core.errors import PeerLostError
from elbowroom.core.windows import bounds
from elbowroom.plans.grid_traffic import SMALL_SUM
from elbowroom.training.process_group import group_for_messages

Direction = Literal["forward", "backward", "update"]

Action = Literal["HALO", "MOVE", "SUM", "GATHER"]
"""What messages are for: rows of neighbours, another layout, a sum, tensors for a checkpoint."""


class Pending(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Return when all of one's own have come. Raises PeerLostError."""


class Transport(Protocol):
    """Messages of one worker, from 0 to ``num_workers - 1``.

    ``start`` sends tensors and receives into others, both by the other worker's number. Messages
    between two workers with the same ``key`` arrive in their order. What is sent must stay as it is
    until ``drain`` has returned.
    """

    worker: int
    num_workers: int

    def start(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor], key: int
    ) -> Pending: ...

    def drain(self) -> None:
        """Return when all that was sent has left. Raises PeerLostError."""


class ProcessTransport:
    """Transport of a worker that is a process of torch's default process group.

    Every worker must make one, and as many as the others: each has a group of its own.
    """

    def __init__(self) -> None:
        self.worker = distributed.get_rank()
        self.num_workers = distributed.get_world_size()
        self._group = group_for_messages()
        self._sending: list[tuple[int, distributed.Work, torch.Tensor]] = []

    def start(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor], key: int
    ) -> Pending:
        # Gloo sends when the receiver is ready. If it knows by then, its own thread sends; where
        # receivers are told first, this thread sends, while gloo's spins for the connection.
        # This is isend and irecv without their checks, which take as long as the messages.
        for peer, tensor in sends.items():
            work = self._group.send([_real(tensor)], peer, key)
            self._sending.append((peer, work, tensor))
        receiving = [
            (peer, self._group.recv([_real(tensor)], peer, key))
            for peer, tensor in receives.items()
        ]
        return _Receiving(receiving)

    def drain(self) -> None:
        for peer, work, _ in self._sending:
            _wait(work, peer)
        self._sending.clear()


class _Receiving:
    def __init__(self, receiving: list[tuple[int, distributed.Work]]) -> None:
        self._receiving = receiving

    def wait(self) -> None:
        for peer, work in self._receiving:
            _wait(work, peer)
        self._receiving = []  # a work that is waited for again does not return


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _wait(work: distributed.Work, peer: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLostError(
            f"worker {peer} of the grid is gone, or said nothing in time: what ended it is told "
            f"by that worker ({error})"
        ) from error


_SECTION_KEYS = 1024
"""Keys of one section of a step."""

LATER_KEYS = 1 << 30
"""Keys of what is not of a section, such as sums of gradients, begin here."""


class Counted(NamedTuple):
    """What one worker has sent in one layer and direction."""

    messages: int = 0
    num_bytes: int = 0


class Waited(NamedTuple):
    """An interval, in seconds of ``perf_counter``, in which a worker waited for messages."""

    action: Action
    layer: str
    direction: Direction
    begin: float
    end: float


class Channel:
    """What the layers of one worker send and receive, with a count of it.

    ``at`` says which layer sends from now on; its messages are counted in ``counts``, and have keys
    of their own, so that layers may send in another order on another worker. ``record`` is when it
    waited, if it is to be kept.
    """

    def __init__(self, transport: Transport, *, keeps_record: bool = False) -> None:
        self.record: list[Waited] = []
        self._keeps_record = keeps_record
        self.transport = transport
        self.worker = transport.worker
        self.num_workers = transport.num_workers
        self.counts: dict[tuple[str, Direction], Counted] = {}
        self._layer = ""
        self._next_key = 0

    def begin_step(self) -> None:
        """Begin a step: every worker must have sent all of the one before."""
        self.transport.drain()
        self._next_key = 0

    def at(self, layer: str, section: int = 0) -> None:
        """Send for a layer from now on, in a numbered section of a step.

        Keys begin anew in each section: a worker may have nothing to do in some.
        """
        self._layer = layer
        self._next_key = section * _SECTION_KEYS

    def route(self, action: Action) -> Route:
        """Where an operation of the present layer sends, forward and backward."""
        self._next_key += 2
        return Route(self._layer, self._next_key - 2, action)

    def start(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        route: Route,
        direction: Direction,
    ) -> Pending:
        """Begin to send and receive; tensors without elements are no messages."""
        sent = {peer: tensor.contiguous() for peer, tensor in sends.items() if tensor.numel()}
        expected = {peer: tensor for peer, tensor in receives.items() if tensor.numel()}
        before = self.counts.get((route.layer, direction), Counted())
        num_bytes = sum(tensor.nbytes for tensor in sent.values())
        self.counts[route.layer, direction] = Counted(
            before.messages + len(sent), before.num_bytes + num_bytes
        )
        return self.transport.start(sent, expected, route.key + (direction != "forward"))

    def swap(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        route: Route,
        direction: Direction,
    ) -> None:
        """Send and receive; returns when all has come."""
        self.wait(self.start(sends, receives, route, direction), route, direction)

    def wait(self, pending: Pending, route: Route, direction: Direction) -> None:
        """Wait for messages. Raises PeerLostError."""
        begin = time.perf_counter()
        pending.wait()
        if self._keeps_record:
            end = time.perf_counter()
            self.record.append(Waited(route.action, route.layer, direction, begin, end))


class Route(NamedTuple):
    """A layer, by which messages are counted, and the key of its forward ones; +1: backward."""

    layer: str
    key: int
    action: Action


class Sum:
    """A sum over some workers of a tensor as large on each, the same bits on all of them.

    Few elements go to all workers at once, and each adds them in the order of ``workers``. Of more,
    each worker adds up a part, to its own, and hands it out, so that each sends 2(q-1)/q of the
    tensor; it is summed in its own memory, if it is contiguous, which is not to be written into
    until ``drain``. Both rounds use one key, in this order. Call ``advance`` when there is time,
    and ``finish`` for the result; all workers must start sums of one route in the same order.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        workers: Sequence[int],
        channel: Channel,
        route: Route,
        direction: Direction,
    ) -> None:
        self._shape = tensor.shape
        self._channel, self._route, self._direction = channel, route, direction
        self._flat = tensor.detach().reshape(-1)
        self._is_small = tensor.numel() <= SMALL_SUM
        self._place = workers.index(channel.worker)
        edges = bounds(self._flat.numel(), len(workers))
        parts = [self._flat[a:b] for a, b in itertools.pairwise(edges)]
        self._own = parts.pop(self._place)
        others = [worker for worker in workers if worker != channel.worker]
        self._parts = dict(zip(others, parts, strict=True))
        sent = self._flat if self._is_small else self._own
        self._summands = sent.new_empty(len(others), sent.numel())
        self._is_advanced = False
        sends = dict.fromkeys(others, self._flat) if self._is_small else self._parts
        receives = dict(zip(others, self._summands, strict=True))
        self._pending = channel.start(sends, receives, route, direction)

    def finish(self) -> torch.Tensor:
        """The sum, of the tensor's shape. Raises PeerLostError."""
        self.advance()
        self._wait()
        return self._flat.view(self._shape)

    def advance(self) -> None:
        """Wait for the first round, and begin the second, if that has not been done."""
        if self._is_advanced:
            return
        self._is_advanced = True
        self._wait()
        if self._is_small:
            summands = [*self._summands]
            summands.insert(self._place, self._flat)
            self._flat = functools.reduce(torch.add, summands)
            return
        for summand in self._summands:
            self._own += summand
        # Who sends a part of the sum has had ours of it: it has left.
        sends = dict.fromkeys(self._parts, self._own)
        self._pending = self._channel.start(sends, self._parts, self._route, self._direction)

    def _wait(self) -> None:
        self._channel.wait(self._pending, self._route, self._direction)


def all_sum(
    tensor: torch.Tensor,
    workers: Sequence[int],
    channel: Channel,
    route: Route,
    direction: Direction,
) -> torch.Tensor:
    """The sum over some workers, by ``Sum``; the tensor itself for one. Raises PeerLostError."""
    if len(workers) == 1:
        return tensor
    own = tensor if tensor.numel() <= SMALL_SUM else tensor.clone()
    return Sum(own, workers, channel, route, direction).finish()
