"""Shipping of a borrower's rows to a layer's owner, which runs the feed-forward network on them.

A borrower writes its rows into a mailbox, memory that it shares with one owner, and rings: it puts
a message of 24 bytes into the owner's pipe, and waits for one in its own. The owner's server, a
thread beside its forward passes, waits for messages, takes all that are there, runs the rows of one
layer in one pass, writes each borrower's part back and rings in turn. No rank waits for one that
has nothing to ship. Buffers are made once; a call allocates what any layer does, its activations.
Mailboxes lie on the device that computes; before a bell rings, the host waits until what it
announces is there. A borrower's first message says that its mailbox is a new one.

On a CPU the server shares its replica's cores with the replica's own passes. Kernels release the
interpreter lock, so neither waits for more than one kernel of the other to begin; the system's
scheduler divides the cores between them: 19 of 20 of the owner's FFNs take at most twice as long
(``bench/shipping.py``). A server on cores of its own would idle most of the time.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.pool.bells import (
    Bell,
    Request,
    answers_path,
    calls_path,
    open_pipe,
    read_messages,
    write_message,
)
from elbowroom.pool.layer import Forward
from elbowroom.pool.run_dir import is_held
from elbowroom.pool.shared_memory import alive_path
from elbowroom.pool.store import tensor_in

SHIP_TIMEOUT_SECONDS = 60.0
"""Seconds that a borrower waits for its rows while the owner lives."""

OpenMailbox = Callable[[int, int, int], torch.Tensor]
"""``Store.mailbox``, called with a borrower, an owner and a number of bytes."""

CPU = torch.device("cpu")

_LOOK_SECONDS = 0.1
"""Seconds between two checks that an owner still lives."""

_FAILED = 2**32 - 1  # as the number of columns of an answer
_CLOSE = 2**32 - 1  # as the layer of a message that a server sends to itself
_NEW_MAILBOX = 2**32 - 2  # as the layer of a borrower's first message


@dataclass(frozen=True)
class Call:
    """A call under way: rows were sent, and ``Shipper.wait`` gives what comes back."""

    owner: int
    layer: int
    number: int
    dtype: torch.dtype


class Shipper:
    """The borrower's end of shipping. One call at a time.

    ``buffer_bytes`` is the most that can be shipped at once. ``timeout_seconds`` is how long
    ``wait`` waits for an owner that lives.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        buffer_bytes: int,
        open_mailbox: OpenMailbox,
        timeout_seconds: float = SHIP_TIMEOUT_SECONDS,
        device: torch.device = CPU,
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._open_mailbox = open_mailbox
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._timeout_seconds = timeout_seconds
        self._answers = open_pipe(answers_path(run_dir, rank))
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self._mailboxes: dict[int, _Mailbox] = {}
        self._bells: dict[int, Bell] = {}
        self._next_call = time.monotonic_ns()  # no answer to an earlier process of this rank fits

    def start(self, owner: int, layer: int, x: torch.Tensor) -> Call:
        """Send ``x`` [rows, columns], no larger than the buffer, to ``owner``.

        Raises PeerLostError if the owner is gone.
        """
        if owner not in self._bells:
            buffer = self._open_mailbox(self._rank, owner, 2 * self._buffer_bytes)
            self._mailboxes[owner] = _Mailbox(buffer, self._buffer_bytes)
            self._bells[owner] = Bell(calls_path(self._run_dir, owner))
            # The owner may have the mailbox of an earlier process of this rank open. One that does
            # not hear this has ended, and the next one has none.
            self._bells[owner].ring(Request(self._rank, _NEW_MAILBOX, 0, 0, 0))
        self._mailboxes[owner].rows(x.shape, x.dtype).copy_(x)
        _finish(self._device)
        self._next_call += 1
        message = Request(self._rank, layer, x.shape[0], x.shape[1], self._next_call)
        if not self._bells[owner].ring(message):
            raise _lost(owner, layer)
        return Call(owner, layer, self._next_call, x.dtype)

    def wait(self, call: Call) -> torch.Tensor:
        """Wait for the rows that come back, [rows, columns], in memory of their own.

        Raises PeerLostError when the owner dies, PoolError when it fails or takes too long.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while (answer := self._receive(call)) is None:
            if not is_held(alive_path(self._run_dir, call.owner)):
                raise _lost(call.owner, call.layer)
            if time.monotonic() > deadline:
                raise PoolError(
                    f"rank {call.owner} did not run layer {call.layer} for rank {self._rank} "
                    f"within {self._timeout_seconds:g} s: see its log"
                )
        if answer.num_columns == _FAILED:
            raise PoolError(
                f"rank {call.owner} failed to run layer {call.layer} for rank {self._rank}: "
                f"see its log"
            )
        shape = torch.Size((answer.num_rows, answer.num_columns))
        return self._mailboxes[call.owner].answers(shape, call.dtype).clone()

    def close(self) -> None:
        os.close(self._answers)
        for bell in self._bells.values():
            bell.close()

    def _receive(self, call: Call) -> Request | None:
        """Wait a moment for the answer to ``call``, and drop answers to calls given up."""
        if not self._poll.poll(_LOOK_SECONDS * 1000):
            return None
        answers = read_messages(self._answers)
        return next((answer for answer in answers if answer.call == call.number), None)


class ShipServer:
    """The owner's end of shipping: a thread that runs layers for borrowers.

    ``layers`` has the forward and the dtype of rows for every layer owned. ``served_rows`` and
    ``served_calls`` count what the thread ran, ``passes`` how often: calls that came together ran
    as one.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        num_ranks: int,
        buffer_bytes: int,
        layers: Mapping[int, tuple[Forward, torch.dtype]],
        open_mailbox: OpenMailbox,
        device: torch.device = CPU,
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._open_mailbox = open_mailbox
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._layers = layers
        self._joined = torch.zeros(num_ranks * buffer_bytes, dtype=torch.uint8, device=device)
        self._calls = open_pipe(calls_path(run_dir, rank), blocking=True)
        self._mailboxes: dict[int, _Mailbox] = {}
        self._bells: dict[int, Bell] = {}
        self._thread = threading.Thread(target=self._run, name="elbowroom-ship", daemon=True)
        self.served_rows = 0
        self.served_calls = 0
        self.passes = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the pass under way, and wait for the thread.

        Calls that come later are not answered.
        """
        if self._thread.ident is not None:
            write_message(self._calls, Request(self._rank, _CLOSE, 0, 0, 0))
            self._thread.join()
        os.close(self._calls)
        for bell in self._bells.values():
            bell.close()

    def _run(self) -> None:
        """Answer calls until ``close`` rings. Waits in ``_receive``, for a borrower's bell."""
        module = torch.get_device_module(self._device)
        module.set_device(self._device)
        with torch.inference_mode(), module.stream(module.Stream()):
            while True:
                calls_by_layer = self._receive()
                if calls_by_layer.pop(_CLOSE, None):
                    return
                for layer, calls in calls_by_layer.items():
                    self._serve(layer, calls)

    def _receive(self) -> dict[int, list[Request]]:
        """Wait for calls, and give those that are there by their layer.

        Calls before a new mailbox of their borrower are those of a process that has ended.
        """
        calls: list[Request] = []
        for call in read_messages(self._calls):
            if call.layer == _NEW_MAILBOX:
                self._mailboxes.pop(call.borrower, None)
                calls = [other for other in calls if other.borrower != call.borrower]
            else:
                calls.append(call)
        calls_by_layer: dict[int, list[Request]] = {}
        for call in calls:
            calls_by_layer.setdefault(call.layer, []).append(call)
        return calls_by_layer

    def _serve(self, layer: int, calls: list[Request]) -> None:
        """Run ``layer`` once for all ``calls``, and answer each.

        A failure is printed and told to every caller; the thread continues.
        """
        try:
            forward, dtype = self._layers[layer]
            inputs = [
                self._mailbox(call.borrower).rows(torch.Size(call[2:4]), dtype) for call in calls
            ]
            joined = forward(self._join(inputs))
            answers, begin = [], 0
            for call in calls:
                rows = joined[begin : begin + call.num_rows]
                begin += call.num_rows
                self._mailbox(call.borrower).answers(rows.shape, dtype).copy_(rows)
                answers.append(call._replace(num_columns=rows.shape[1]))
            _finish(self._device)
        except Exception as error:
            print(f"elbowroom: layer {layer} failed for {calls}: {error!r}", flush=True)
            answers = [call._replace(num_columns=_FAILED) for call in calls]
        self.passes += 1
        for answer in answers:
            self.served_calls += 1
            self.served_rows += answer.num_rows
            self._bell(answer.borrower).ring(answer)  # a borrower that is gone hears nothing

    def _join(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Join the callers' rows into one matrix; those of a single caller stay where they are."""
        if len(inputs) == 1:
            return inputs[0]
        shape = torch.Size((sum(map(len, inputs)), inputs[0].shape[1]))
        return torch.cat(inputs, out=tensor_in(self._joined, 0, shape, inputs[0].dtype))

    def _mailbox(self, borrower: int) -> _Mailbox:
        if borrower not in self._mailboxes:
            buffer = self._open_mailbox(borrower, self._rank, 2 * self._buffer_bytes)
            self._mailboxes[borrower] = _Mailbox(buffer, self._buffer_bytes)
        return self._mailboxes[borrower]

    def _bell(self, borrower: int) -> Bell:
        if borrower not in self._bells:
            self._bells[borrower] = Bell(answers_path(self._run_dir, borrower))
        return self._bells[borrower]


@dataclass(frozen=True)
class _Mailbox:
    """Memory that one borrower shares with one owner: rows, and from ``answers_at`` the answer.

    An owner answers in the order of calls, so an answer to a call that was given up is overwritten
    by the next.
    """

    buffer: torch.Tensor
    answers_at: int

    def rows(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return tensor_in(self.buffer, 0, shape, dtype)

    def answers(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return tensor_in(self.buffer, self.answers_at, shape, dtype)


def _lost(owner: int, layer: int) -> PeerLostError:
    return PeerLostError(f"rank {owner} died before it ran layer {layer}: see its log")


def _finish(device: torch.device) -> None:
    """Wait until the device's current stream has done all. On a CPU that is always so."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream().synchronize()
