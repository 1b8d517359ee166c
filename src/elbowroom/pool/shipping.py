"""The borrower's end of shipping: rows travel to a layer's owner, which runs the layer on them.

A borrower writes its rows into a mailbox, memory that it shares with one owner, and rings: it puts
a message of 24 bytes into the owner's pipe, and waits for one in its own. The owner (``serving``)
writes what comes out into the mailbox and rings back. No rank waits for one that has nothing to
ship. Buffers are made once. Mailboxes lie on the device that computes; before a bell rings, the
host waits until what it announces is there.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from elbowroom.core.errors import PeerLostError, PoolError
from elbowroom.pool.bells import (
    CPU,
    FAILED,
    NEW_MAILBOX,
    Bell,
    Mailbox,
    OpenMailbox,
    Request,
    answers_path,
    calls_path,
    finish,
    open_pipe,
    read_messages,
)
from elbowroom.pool.run_dir import is_held
from elbowroom.pool.shared_memory import alive_path
from elbowroom.pool.turns import Turns

SHIP_TIMEOUT_SECONDS = 60.0
"""Seconds that a borrower waits for its rows while the owner lives."""

_LOOK_SECONDS = 0.1
"""Seconds between two checks that an owner still lives."""


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
    ``wait`` waits for an owner that lives. ``turns`` are those of this replica's own server, if
    it has any: peers are served while ``wait`` waits.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        buffer_bytes: int,
        open_mailbox: OpenMailbox,
        timeout_seconds: float = SHIP_TIMEOUT_SECONDS,
        device: torch.device = CPU,
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns
        self._run_dir = run_dir
        self._rank = rank
        self._open_mailbox = open_mailbox
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._timeout_seconds = timeout_seconds
        self._answers = open_pipe(answers_path(run_dir, rank))
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self._mailboxes: dict[int, Mailbox] = {}
        self._bells: dict[int, Bell] = {}
        self._next_call = time.monotonic_ns()  # no answer to an earlier process of this rank fits

    def start(self, owner: int, layer: int, x: torch.Tensor) -> Call:
        """Send ``x`` [rows, columns], no larger than the buffer, to ``owner``.

        Raises PeerLostError if the owner is gone.
        """
        if owner not in self._bells:
            buffer = self._open_mailbox(self._rank, owner, 2 * self._buffer_bytes)
            self._mailboxes[owner] = Mailbox(buffer, self._buffer_bytes)
            self._bells[owner] = Bell(calls_path(self._run_dir, owner))
            # The owner may have the mailbox of an earlier process of this rank open. One that does
            # not hear this has ended, and the next one has none.
            self._bells[owner].ring(Request(self._rank, NEW_MAILBOX, 0, 0, 0))
        self._mailboxes[owner].rows(x.shape, x.dtype).copy_(x)
        finish(self._device)
        self._next_call += 1
        message = Request(self._rank, layer, x.shape[0], x.shape[1], self._next_call)
        if not self._bells[owner].ring(message):
            raise _lost(owner, layer)
        return Call(owner, layer, self._next_call, x.dtype)

    def wait(self, call: Call) -> torch.Tensor:
        """Wait for the rows that come back, [rows, columns], in memory of their own.

        Raises PeerLostError when the owner dies, PoolError when it fails or takes too long.
        """
        with self._turns.pause() if self._turns else nullcontext():
            answer = self._await(call)
        if answer.num_columns == FAILED:
            raise PoolError(
                f"rank {call.owner} failed to run layer {call.layer} for rank {self._rank}: "
                f"see its log"
            )
        shape = torch.Size((answer.num_rows, answer.num_columns))
        return self._mailboxes[call.owner].answers(shape, call.dtype).clone()

    def _await(self, call: Call) -> Request:
        deadline = time.monotonic() + self._timeout_seconds
        while (answer := self._receive(call)) is None:
            if not is_held(alive_path(self._run_dir, call.owner)):
                raise _lost(call.owner, call.layer)
            if time.monotonic() > deadline:
                raise PoolError(
                    f"rank {call.owner} did not run layer {call.layer} for rank {self._rank} "
                    f"within {self._timeout_seconds:g} s: see its log"
                )
        return answer

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


def _lost(owner: int, layer: int) -> PeerLostError:
    return PeerLostError(f"rank {owner} died before it ran layer {layer}: see its log")
