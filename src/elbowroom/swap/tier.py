"""Slow tiers: where storages stay while they are away from the device.

A tier is divided into slots. The main thread takes them and the link thread copies; slots may be
given back from any thread, also while the garbage collector runs.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path
from typing import NamedTuple

from elbowroom.core.errors import InputError, SwapError, TierFullError
from elbowroom.core.units import MIB, format_bytes

_BLOCK = 4096
"""Alignment of direct file access, in bytes."""

_BUFFER_BYTES = 4 * MIB


class Slot(NamedTuple):
    """Part of a tier, from byte ``offset``; ``num_bytes`` is a multiple of the block size."""

    offset: int
    num_bytes: int


class Tier(ABC):
    """Slow memory of ``capacity_bytes``, in slots. Use one with one link only."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._top = 0
        self._num_taken = 0
        self._free: dict[int, list[int]] = {}
        self._returned: deque[Slot] = deque()

    def take(self, num_bytes: int) -> Slot:
        """Take a slot for ``num_bytes``. Raises TierFullError."""
        while self._returned:
            slot = self._returned.popleft()
            self._free.setdefault(slot.num_bytes, []).append(slot.offset)
            self._num_taken -= 1
        if not self._num_taken:  # nothing is away: slots of any sizes may follow
            self._free, self._top = {}, 0
        size = -(-num_bytes // _BLOCK) * _BLOCK
        if offsets := self._free.get(size):
            slot = Slot(offsets.pop(), size)
        else:
            slot = Slot(self._top, size)
            self._check_room(slot)
            self._top += size
        self._num_taken += 1
        return slot

    def give(self, slot: Slot) -> None:
        """Give a slot back; what it holds may be overwritten."""
        self._returned.append(slot)

    def _check_room(self, slot: Slot) -> None:
        if slot.offset + slot.num_bytes > self.capacity_bytes:
            raise TierFullError(
                f"the slow tier has {format_bytes(self.capacity_bytes)}, of which "
                f"{format_bytes(self._top)} are taken, and {format_bytes(slot.num_bytes)} more are "
                "needed: give it more room, or raise the memory budget so that less leaves"
            )

    @abstractmethod
    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        """Copy memory into a slot, outside of the interpreter's lock. Raises SwapError."""

    @abstractmethod
    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        """Copy a slot into memory, outside of the interpreter's lock. Raises SwapError."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; nothing may be written or read any more."""


class FileTier(Tier):
    """A file that has no name, past the page cache where its file system allows that.

    The page cache counts against memory limits and hides what a disk costs; ``is_direct`` says
    whether it is passed by. The file is unlinked when made, so a killed run leaves nothing behind.
    Copies go through an aligned buffer of 4 MiB.
    """

    def __init__(self, folder: Path | None = None, capacity_bytes: int | None = None) -> None:
        """Make the file in ``folder``; the capacity is what is free there unless given.

        Raises InputError if the folder cannot have it.
        """
        folder = folder or Path(tempfile.gettempdir())
        try:
            free_bytes = shutil.disk_usage(folder).free
            self._file, self.is_direct = _open_unnamed(folder)
        except OSError as error:
            raise InputError(f"no slow tier in {folder}: {error.strerror}") from error
        super().__init__(free_bytes if capacity_bytes is None else capacity_bytes)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._buffer_address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        for begin in range(0, num_bytes, _BUFFER_BYTES):
            size = min(_BUFFER_BYTES, num_bytes - begin)
            ctypes.memmove(self._buffer_address, address + begin, size)
            self._transfer(slot, begin, size, is_write=True)

    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        for begin in range(0, num_bytes, _BUFFER_BYTES):
            size = min(_BUFFER_BYTES, num_bytes - begin)
            self._transfer(slot, begin, size, is_write=False)
            ctypes.memmove(address + begin, self._buffer_address, size)

    def _transfer(self, slot: Slot, begin: int, size: int, *, is_write: bool) -> None:
        """Copy whole blocks between the buffer and the file."""
        done, end = 0, -(-size // _BLOCK) * _BLOCK
        view = memoryview(self._buffer)
        try:
            while done < end:
                at = slot.offset + begin + done
                if is_write:
                    count = os.pwrite(self._file, view[done:end], at)
                else:
                    count = os.preadv(self._file, [view[done:end]], at)
                if not count:
                    raise SwapError(f"the slow tier's file ends at byte {at}: it was cut off")
                done += count
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise TierFullError(
                    f"the disk of the slow tier is full after {format_bytes(slot.offset + begin)}: "
                    "free some space, or choose another folder"
                ) from error
            raise SwapError(f"the slow tier's file: {error.strerror}") from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class MemoryTier(Tier):
    """A shared mapping of this machine's memory, whose pages are made as they are first used.

    It stands for the host memory beside a device: PyTorch's allocator and ``RLIMIT_DATA`` do not
    count it. A limit on the memory of all of the process does.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Reserve addresses only. Raises InputError if there are not so many."""
        super().__init__(capacity_bytes)
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._mapping = mmap.mmap(-1, max(_BLOCK, capacity_bytes), flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"no slow tier of {format_bytes(capacity_bytes)} in memory: {error}"
            ) from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        ctypes.memmove(self._address + slot.offset, address, num_bytes)

    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        ctypes.memmove(address, self._address + slot.offset, num_bytes)

    def close(self) -> None:
        self._mapping.close()


def _open_unnamed(folder: Path) -> tuple[int, bool]:
    """Open a new file without a name. Returns its descriptor and whether access is direct."""
    descriptor, name = tempfile.mkstemp(prefix=".elbowroom-swap-", dir=folder)
    try:
        direct = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system without direct access
        return descriptor, False
    finally:
        Path(name).unlink()
    os.close(descriptor)
    return direct, hasattr(os, "O_DIRECT")
