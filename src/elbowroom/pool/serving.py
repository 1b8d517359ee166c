"""The owner's end of shipping: it runs its layers on the rows of borrowers.

A thread waits for messages. What has come is run layer by layer, the rows of all borrowers of a
layer in one pass; each borrower's part is written back, and its bell rung. A call allocates what
any layer does, its activations.

On a CPU the server shares its replica's cores with the replica's own passes, and takes ``turns``
with them: between two layers of a pass the thread that computes serves what waits, otherwise the
server's own. An owner's layer is then delayed by those that were waiting, one for each of its peers
at most. On a device the thread serves beside the passes, on a stream of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

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
    write_message,
)
from elbowroom.pool.layer import Forward
from elbowroom.pool.store import tensor_in
from elbowroom.pool.turns import Turns

_CLOSE, _WAKE = 2**32 - 1, 2**32 - 3
"""As the layer of messages that a server sends to itself."""


class ShipServer:
    """The owner's end of shipping: it runs layers for borrowers, those that asked first first.

    ``layers`` has the forward and the dtype of rows for every layer owned. ``turns`` says when it
    may; without them the thread serves beside forward passes. ``served_rows`` and ``served_calls``
    count what was run, ``passes`` how often: calls that came together ran as one.
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
        turns: Turns | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._open_mailbox = open_mailbox
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._layers = layers
        self._joined = torch.zeros(num_ranks * buffer_bytes, dtype=torch.uint8, device=device)
        self._calls = open_pipe(calls_path(run_dir, rank), blocking=True)
        self._mailboxes: dict[int, Mailbox] = {}
        self._bells: dict[int, Bell] = {}
        self._thread = threading.Thread(target=self._run, name="elbowroom-ship", daemon=True)
        self._arrived: deque[Request] = deque()  # filled by the thread, emptied in a turn
        self._waiting: list[Request] = []  # touched in a turn alone
        self.turns = turns
        self.served_rows = 0
        self.served_calls = 0
        self.passes = 0

    def start(self) -> None:
        self._thread.start()
        if self.turns is not None:
            self.turns.when_open(self._wake)

    def close(self) -> None:
        """Stop after the layer under way, and wait for the thread.

        Calls that come later are not answered.
        """
        if self.turns is not None:
            self.turns.when_open(_do_nothing)
        if self._thread.ident is not None:
            write_message(self._calls, Request(self._rank, _CLOSE, 0, 0, 0))
            self._thread.join()
        os.close(self._calls)
        for bell in self._bells.values():
            bell.close()

    def serve_waiting(self) -> None:
        """Run what waits now, within a forward pass: each layer once. Costs nothing if none does.

        Calls that come meanwhile wait for the next time, so that the pass goes on.
        """
        if not self._arrived and not self._waiting:
            return
        with torch.inference_mode():
            self._sort_in()
            for _ in range(len({call.layer for call in self._waiting})):
                self._serve(self._take_layer())

    def _run(self) -> None:
        """Serve until ``close`` rings. Waits for bells: a borrower's, or that of a pass that ended.

        Whether a pass has the turn is asked after a call has been put down: a pass that ends
        meanwhile sees the call, and rings.
        """
        module = torch.get_device_module(self._device)
        module.set_device(self._device)
        with torch.inference_mode(), module.stream(module.Stream()):
            while True:
                messages = read_messages(self._calls)
                if any(message.layer == _CLOSE for message in messages):
                    return
                self._arrived.extend(one for one in messages if one.layer != _WAKE)
                while self._serve_next():
                    pass

    def _wake(self) -> None:
        if self._arrived or self._waiting:
            write_message(self._calls, Request(self._rank, _WAKE, 0, 0, 0))

    def _serve_next(self) -> bool:
        """Serve the next layer that is asked for, on the thread. False if none is, or not now."""
        if self.turns is not None and not self.turns.try_serve():
            return False
        try:
            self._sort_in()
            calls = self._take_layer()
            if calls:
                self._serve(calls)
            return bool(calls)
        finally:
            if self.turns is not None:
                self.turns.end_serving()

    def _sort_in(self) -> None:
        """Queue what has arrived.

        Calls before a new mailbox of their borrower are those of a process that has ended.
        """
        while self._arrived:
            call = self._arrived.popleft()
            if call.layer == NEW_MAILBOX:
                self._mailboxes.pop(call.borrower, None)
                self._waiting = [one for one in self._waiting if one.borrower != call.borrower]
            else:
                self._waiting.append(call)

    def _take_layer(self) -> list[Request]:
        """Take the calls of the layer that was asked for first; there may be none."""
        layer = self._waiting[0].layer if self._waiting else None
        calls = [call for call in self._waiting if call.layer == layer]
        self._waiting = [call for call in self._waiting if call.layer != layer]
        return calls

    def _serve(self, calls: list[Request]) -> None:
        """Run a layer once for all ``calls``, which are of that layer, and answer each.

        A failure is printed and told to every caller; the server continues.
        """
        layer, num_rows = calls[0].layer, sum(call.num_rows for call in calls)
        try:
            forward, dtype = self._layers[layer]
            inputs = [
                self._mailbox(call.borrower).rows(torch.Size(call[2:4]), dtype) for call in calls
            ]
            with self.turns.context(num_rows) if self.turns else nullcontext():
                joined = forward(self._join(inputs))
            answers, begin = [], 0
            for call in calls:
                rows = joined[begin : begin + call.num_rows]
                begin += call.num_rows
                self._mailbox(call.borrower).answers(rows.shape, dtype).copy_(rows)
                answers.append(call._replace(num_columns=rows.shape[1]))
            finish(self._device)
        except Exception as error:
            print(f"elbowroom: layer {layer} failed for {calls}: {error!r}", flush=True)
            answers = [call._replace(num_columns=FAILED) for call in calls]
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

    def _mailbox(self, borrower: int) -> Mailbox:
        if borrower not in self._mailboxes:
            buffer = self._open_mailbox(borrower, self._rank, 2 * self._buffer_bytes)
            self._mailboxes[borrower] = Mailbox(buffer, self._buffer_bytes)
        return self._mailboxes[borrower]

    def _bell(self, borrower: int) -> Bell:
        if borrower not in self._bells:
            self._bells[borrower] = Bell(answers_path(self._run_dir, borrower))
        return self._bells[borrower]


def _do_nothing() -> None:
    """Wake nobody: the thread has ended."""
