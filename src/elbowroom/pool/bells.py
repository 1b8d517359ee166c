"""What borrowers and owners share to ship rows: mailboxes of rows, and bells that announce them.

A bell is a short message in a named pipe, which wakes who reads it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from elbowroom.pool.store import tensor_in

OpenMailbox = Callable[[int, int, int], torch.Tensor]
"""``Store.mailbox``, called with a borrower, an owner and a number of bytes."""

CPU = torch.device("cpu")

FAILED = 2**32 - 1
"""As the number of columns of an answer."""

NEW_MAILBOX = 2**32 - 2
"""As the layer of a borrower's first message, which says that its mailbox is a new one."""

_MESSAGE = struct.Struct("<IIIIQ")  # short enough for a pipe to keep it whole
_MOST_MESSAGES = 128


class Request(NamedTuple):
    """A borrower's call, or its owner's answer, which tells the shape that comes back."""

    borrower: int
    layer: int
    num_rows: int
    num_columns: int
    call: int


@dataclass(frozen=True)
class Mailbox:
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


class Bell:
    """The writing end of a peer's named pipe, opened again when that peer is started again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def ring(self, message: Request) -> bool:
        """Send ``message`` without waiting. False when no live process reads the pipe."""
        for _ in range(2):
            try:
                if self._descriptor < 0:
                    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                    self._descriptor = os.open(self._path, flags)
                write_message(self._descriptor, message)
                return True
            except OSError:  # no such pipe, or nobody has it open any more
                self.close()
        return False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_messages(descriptor: int) -> list[Request]:
    """Read all messages that are there; wait for one where the pipe blocks."""
    data = os.read(descriptor, _MOST_MESSAGES * _MESSAGE.size)
    return [Request(*fields) for fields in _MESSAGE.iter_unpack(data)]


def write_message(descriptor: int, message: Request) -> None:
    """Write ``message`` whole. Raises OSError when nobody reads the pipe."""
    os.write(descriptor, _MESSAGE.pack(*message))


def open_pipe(path: Path, blocking: bool = False) -> int:
    """Make a named pipe at ``path``, in place of what is there, and open it for reading.

    The descriptor writes, too, so that the pipe never breaks when the last peer closes it.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    flags = os.O_RDWR | os.O_CLOEXEC | (0 if blocking else os.O_NONBLOCK)
    return os.open(path, flags)


def calls_path(run_dir: Path, owner: int) -> Path:
    return run_dir / f"calls-{owner}"


def answers_path(run_dir: Path, borrower: int) -> Path:
    return run_dir / f"answers-{borrower}"


def finish(device: torch.device) -> None:
    """Wait until the device's current stream has done all. On a CPU that is always so."""
    if device.type != "cpu":
        torch.get_device_module(device).current_stream().synchronize()
