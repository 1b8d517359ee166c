"""Tensors between workers: point to point over torch.distributed, beside compute.

From each worker to each other leads one channel, in order. A message is a header, then its tensors.
A thread per sender receives ahead of compute, into memory that was given back; one per stage next
to this one waits until what is sent has left.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import distributed

from elbowroom.core.errors import ElbowroomError, PeerLostError
from elbowroom.training.values import MOST_DIMENSIONS

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
)
"""Types of tensors that can be sent; a header names them by number."""

_MOST_TENSORS = 32
_TENSOR_SIZE = 3 + MOST_DIMENSIONS
_HEADER_SIZE = 2 + _MOST_TENSORS * _TENSOR_SIZE
_CLOSE = -1
"""Stands in a header in place of the minibatch: no message will follow."""


class TensorMessage(NamedTuple):
    """Tensors of one minibatch, and for which of them a gradient is needed."""

    tensors: tuple[torch.Tensor, ...]
    needs_grad: tuple[bool, ...]


class Connection:
    """One worker's ends of its channels to the workers of a neighbouring stage.

    They take turns: minibatch i is worker ``workers[i % len(workers)]``'s. This worker has each
    ``stride``-th, and reads messages in the order of minibatches. Once one is asked for, the next
    ``ahead`` are received before they are read, whoever sends them; later ones stay with their
    senders. So ``num_messages``, for which memory is made when the first one comes, are never
    exceeded where not more than ``num_messages - ahead`` are kept here.

    Raises what ``torch.distributed`` raises where no process group is there.
    """

    def __init__(
        self, workers: Sequence[int], stride: int = 1, ahead: int = 1, num_messages: int = 1
    ) -> None:
        self._workers = workers
        self._stride = stride
        self._ahead = ahead
        self._memory = _Memory(num_messages)
        self._window = _Window()
        self._inboxes = {worker: _Inbox(worker, self._memory, self._window) for worker in workers}
        self._outbox = _Outbox()
        self.sent_bytes: Counter[int] = Counter()
        """Bytes of tensors sent to each worker, without headers."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that messages are received in, used and spare."""
        return self._memory.num_bytes

    def send(self, minibatch: int, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to send a minibatch's tensors, which must not change any more."""
        worker = self._worker(minibatch)
        whole = tuple(tensor.detach().contiguous() for tensor in tensors)
        self._outbox.send(worker, (_header(minibatch, tensors), *whole))
        self.sent_bytes[worker] += sum(tensor.nbytes for tensor in whole)

    def wait_until_sent(self, but: int = 0) -> None:
        """Wait until all but the last ``but`` messages have left.

        Raises PeerLostError when a worker is gone.
        """
        self._outbox.wait(but)

    def receive(self, minibatch: int) -> TensorMessage:
        """Wait for a minibatch's message. Raises PeerLostError when its worker is gone."""
        self._window.open(minibatch + (self._ahead - 1) * self._stride)
        message = self._inboxes[self._worker(minibatch)].receive()
        self._window.open(minibatch + self._ahead * self._stride)
        self._outbox.let_go()
        return message

    def give_back(self, message: TensorMessage) -> None:
        """Let later messages use the memory of this one, which nothing reads any more."""
        self._memory.give_back(message.tensors)

    def close(self) -> None:
        """Wait until all is sent, tell the workers so, and wait to hear the same from them."""
        for worker in self._workers:
            self._outbox.send(worker, (torch.full((_HEADER_SIZE,), _CLOSE),))
        self._outbox.close()
        for inbox in self._inboxes.values():
            inbox.close()

    def _worker(self, minibatch: int) -> int:
        return self._workers[minibatch % len(self._workers)]


class _Sending(NamedTuple):
    """A message that is being sent.

    ``works`` hold the tensors too, and are taken away one by one as they end.
    """

    worker: int
    works: list[distributed.Work]
    sent: threading.Event


class _Outbox:
    """Messages being sent; their tensors are kept until gloo has sent them.

    A thread waits for that, as gloo tells only those who wait. Tensors are let go by the thread
    that sends, the next time that it is here.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[_Sending, tuple[torch.Tensor, ...]]] = deque()
        self._begun: queue.SimpleQueue[_Sending | None] = queue.SimpleQueue()
        self._failure: PeerLostError | None = None
        self._thread = threading.Thread(target=self._run, name="sends", daemon=True)
        self._thread.start()

    def send(self, worker: int, tensors: tuple[torch.Tensor, ...]) -> None:
        """Begin to send tensors to a worker. Raises PeerLostError when it is gone."""
        try:
            begun = [distributed.isend(tensor, worker) for tensor in tensors]
        except RuntimeError as error:
            raise _lost(worker) from error
        works = [work for work in begun if work is not None]
        sending = _Sending(worker, works, threading.Event())
        self._kept.append((sending, tensors))
        self._begun.put(sending)
        self.let_go()

    def let_go(self) -> None:
        """Drop the tensors of messages that have been sent."""
        while self._kept and self._kept[0][0].sent.is_set():
            self._kept.popleft()

    def wait(self, but: int) -> None:
        """Wait until all but the last ``but`` are sent. Raises PeerLostError where one fails."""
        while len(self._kept) > but:
            self._kept[0][0].sent.wait()
            self.let_go()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for all, and end the thread. Raises PeerLostError where one could not be sent."""
        self.wait(0)
        self._begun.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._finish_oldest():
            pass

    def _finish_oldest(self) -> bool:
        sending = self._begun.get()
        if sending is None:
            return False
        try:
            while sending.works:
                sending.works.pop(0).wait()
        except RuntimeError as error:
            self._failure = _lost(sending.worker)
            self._failure.__cause__ = error
            sending.works.clear()
        sending.sent.set()
        return True


class _Window:
    """The last minibatch whose message may be received, the same for all senders."""

    def __init__(self) -> None:
        self._last = -1
        self._changed = threading.Condition()

    def open(self, last: int) -> None:
        with self._changed:
            self._last = max(self._last, last)
            self._changed.notify_all()

    def wait(self, minibatch: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: minibatch <= self._last)


class _Inbox:
    """A thread that receives from one worker, as far ahead as the window allows."""

    def __init__(self, source: int, memory: _Memory, window: _Window) -> None:
        self._source = source
        self._memory = memory
        self._window = window
        self._messages: queue.SimpleQueue[TensorMessage | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"from-{source}", daemon=True)
        self._thread.start()

    def receive(self) -> TensorMessage:
        message = self._messages.get()
        if isinstance(message, Exception):
            self._messages.put(message)
            raise _lost(self._source) from message
        return message

    def close(self) -> None:
        """Wait for the sender to close. Raises PeerLostError when it does not."""
        self._thread.join()
        if not self._messages.empty():
            self.receive()

    def _run(self) -> None:
        header = torch.empty(_HEADER_SIZE, dtype=torch.int64)
        try:
            while True:
                distributed.recv(header, self._source)
                minibatch, count, *fields = header.tolist()
                if minibatch == _CLOSE:
                    return
                described = _parse(fields[: count * _TENSOR_SIZE])
                self._window.wait(minibatch)
                tensors = self._memory.take(described)
                for tensor in tensors:
                    distributed.recv(tensor, self._source)
                self._messages.put(TensorMessage(tensors, tuple(x.needs_grad for x in described)))
        except Exception as error:  # handed to whoever waits for a message
            self._messages.put(error)


def _lost(worker: int) -> PeerLostError:
    return PeerLostError(f"worker {worker} ended: see its output")


class _Memory:
    """Memory that several threads receive messages of the same tensors in.

    There is room for ``num_messages`` as soon as the first one says how large they are.
    """

    def __init__(self, num_messages: int) -> None:
        self._num_messages = num_messages
        self._lock = threading.Lock()
        self._spare: list[tuple[torch.Tensor, ...]] = []
        self._made: list[weakref.ref[torch.Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, used and spare."""
        return sum(tensor.nbytes for made in self._made if (tensor := made()) is not None)

    def give_back(self, tensors: tuple[torch.Tensor, ...]) -> None:
        with self._lock:
            self._spare.append(tensors)

    def take(self, described: Sequence[_Described]) -> tuple[torch.Tensor, ...]:
        """Spare tensors of the described shapes, or new ones; spares that do not fit are let go."""
        with self._lock:
            while self._spare:
                tensors = self._spare.pop()
                if [(x.shape, x.dtype) for x in tensors] == [(x.shape, x.dtype) for x in described]:
                    return tensors
            self._spare = [
                tuple(torch.empty(one.shape, dtype=one.dtype) for one in described)
                for _ in range(1 if self._made else self._num_messages)
            ]
            alive = [made for made in self._made if made() is not None]
            self._made = [*alive, *(weakref.ref(x) for tensors in self._spare for x in tensors)]
            return self._spare.pop()


class _Described(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    needs_grad: bool
    shape: tuple[int, ...]


def _header(minibatch: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The header of a message. Raises ElbowroomError for tensors that it cannot describe."""
    fields = [minibatch, len(tensors)]
    for tensor in tensors:
        if tensor.dim() > MOST_DIMENSIONS or tensor.dtype not in _DTYPES:
            raise ElbowroomError(
                f"a tensor of {tensor.dim()} dimensions and {tensor.dtype} crosses a cut: at most "
                f"{MOST_DIMENSIONS} dimensions of common types can be sent"
            )
        fields += [_DTYPES.index(tensor.dtype), tensor.requires_grad, tensor.dim(), *tensor.shape]
        fields += [0] * (MOST_DIMENSIONS - tensor.dim())
    if len(fields) > _HEADER_SIZE:
        raise ElbowroomError(
            f"{len(tensors)} tensors cross one cut, {_MOST_TENSORS} can: cut the model elsewhere"
        )
    return torch.tensor(fields + [0] * (_HEADER_SIZE - len(fields)), dtype=torch.int64)


def _parse(fields: list[int]) -> list[_Described]:
    described = []
    for start in range(0, len(fields), _TENSOR_SIZE):
        dtype, needs_grad, num_dimensions, *shape = fields[start : start + _TENSOR_SIZE]
        described.append(
            _Described(_DTYPES[dtype], bool(needs_grad), tuple(shape[:num_dimensions]))
        )
    return described
