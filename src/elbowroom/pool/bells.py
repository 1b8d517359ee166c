"""Bells between the processes of a group: short messages in named pipes, which wake who reads."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

_MESSAGE = struct.Struct("<IIIIQ")  # short enough for a pipe to keep it whole
_MOST_MESSAGES = 128


class Request(NamedTuple):
    """A borrower's call, or its owner's answer, which tells the shape that comes back."""

    borrower: int
    layer: int
    num_rows: int
    num_columns: int
    call: int


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
