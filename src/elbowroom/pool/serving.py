"""The owner's end of shipping: it runs its layers on the rows of borrowers.

A thread beside the forward passes waits for messages, takes all that are there, runs the rows of
one layer in one pass, writes each borrower's part back and rings. A call allocates what any layer
does, its activations.

On a CPU the server shares its replica's cores with the replica's own passes. Kernels release the
interpreter lock, so neither waits for more than one kernel of the other to begin; the system's
scheduler divides the cores between them: 19 of 20 of the owner's FFNs take at most twice as long
(``bench/shipping.py``). A server on cores of its own would idle most of the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
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

_CLOSE = 2**32 - 1
"""As the layer of a message that a server sends to itself."""


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
        self._mailboxes: dict[int, Mailbox] = {}
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
            if call.layer == NEW_MAILBOX:
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
