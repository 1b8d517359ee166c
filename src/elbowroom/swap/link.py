"""The link between device and slow tier: one thread that copies, in the order it is told.

The main thread asks for copies and waits for them; the link thread does nothing but copy, outside
of the interpreter's lock. It allocates nothing. Its first failure is kept: whoever waits, or asks
for more, gets it as an error.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from elbowroom.core.errors import InputError, SwapError
from elbowroom.plans.swap import Direction, Transfer
from elbowroom.swap.tier import Slot, Tier

_STACK_BYTES = 1 << 20
"""Stack of the link thread: the default of 8 MiB would count against limits on memory."""

_LOOK_SECONDS = 0.5
"""How often one who waits looks whether the link thread is still there."""


@dataclass(eq=False)
class Copy:
    """One copy that was asked for.

    ``storage`` is held until the copy is made; then the link lets go of it, and sets ``done``.
    ``begin`` and ``end`` are then when it was made, by ``time.perf_counter``.
    """

    direction: Direction
    storage: torch.UntypedStorage | None
    slot: Slot
    done: threading.Event = field(default_factory=threading.Event)
    begin: float = 0.0
    end: float = 0.0


class CopyLink(Protocol):
    """What a step needs of a link: a ``Link``, or a stand-in for one."""

    @property
    def tier(self) -> Tier:
        """Where storages go."""

    def ask(self, copy: Copy) -> None:
        """Have a copy made after those asked for before."""

    def wait(self, copy: Copy) -> None:
        """Wait until a copy is made."""

    def check(self) -> None:
        """Raise SwapError if copies are made no longer."""


class Link:
    """One thread that copies between storages and a tier, first asked first served.

    ``busy_seconds``, ``out_bytes`` and ``in_bytes`` are totals since it was made.

    Args:
        tier: where storages go; the link owns it, and closes it.
        bytes_per_second: hold copies back to this rate; None for as fast as possible.
        timeout_seconds: longest wait for one copy before the link is given up.

    """

    def __init__(
        self, tier: Tier, bytes_per_second: float | None = None, timeout_seconds: float = 120.0
    ) -> None:
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise InputError(f"a link of {bytes_per_second} bytes/s: give a rate above 0")
        self.tier = tier
        self.busy_seconds = 0.0
        self.out_bytes = 0
        self.in_bytes = 0
        self._bytes_per_second = bytes_per_second
        self._timeout_seconds = timeout_seconds
        self._failure: BaseException | None = None
        self._is_closed = False
        self._queue: queue.SimpleQueue[Copy | None] = queue.SimpleQueue()
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._run, name="swap link", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)

    def ask(self, copy: Copy) -> None:
        """Have a copy made after those asked for before. Raises SwapError if the link failed."""
        self.check()
        self._queue.put(copy)

    def wait(self, copy: Copy) -> None:
        """Wait until a copy is made. Raises SwapError if the link failed, or takes too long."""
        deadline = time.monotonic() + self._timeout_seconds
        while not copy.done.wait(_LOOK_SECONDS):
            self.check()
            if time.monotonic() > deadline:
                self._failure = SwapError(
                    f"the link did not copy {copy.slot.num_bytes} bytes {copy.direction} within "
                    f"{self._timeout_seconds:g} s: the slow tier hangs, or is far too slow"
                )
        self.check()

    def fetch(self, copy: Copy) -> None:
        """Have a copy made and wait for it; once the link has failed, make it in this thread.

        So what left before a failure can still be read. Raises SwapError if that fails, too, or if
        the link was closed.
        """
        storage = copy.storage
        try:
            self.ask(copy)
            self.wait(copy)
        except SwapError:
            self._queue.put(None)
            self._thread.join(_LOOK_SECONDS)
            if self._is_closed or self._thread.is_alive():
                raise
            copy.storage = storage
            try:
                self._make(copy)
            except OSError as error:
                raise SwapError(f"the slow tier cannot be read: {error!r}") from error
            copy.storage = None
            copy.done.set()

    def check(self) -> None:
        """Raise SwapError if a copy failed or the thread is gone; the first failure is its cause.

        An error of the tier itself is raised as it is.
        """
        failure = self._failure
        if isinstance(failure, SwapError):
            raise failure
        if failure is not None:
            raise SwapError(f"the link to the slow tier failed: {failure!r}") from failure
        if not self._thread.is_alive():
            raise SwapError("the link to the slow tier is closed, or its thread died")

    def close(self) -> None:
        """Finish the copies asked for, end the thread, and close the tier."""
        self._is_closed = True
        self._queue.put(None)
        self._thread.join(self._timeout_seconds)
        if not self._thread.is_alive():
            self.tier.close()

    def _run(self) -> None:
        while (copy := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    self._make(copy)
                except BaseException as error:
                    self._failure = error
            copy.storage = None  # before the signal: whoever waited may count on its release
            copy.done.set()
            del copy

    def _make(self, copy: Copy) -> None:
        storage = copy.storage
        assert storage is not None
        copy.begin, num_bytes = time.perf_counter(), storage.nbytes()
        if copy.direction == "out":
            self.tier.write(copy.slot, storage.data_ptr(), num_bytes)
            self.out_bytes += num_bytes
        else:
            self.tier.read(copy.slot, storage.data_ptr(), num_bytes)
            self.in_bytes += num_bytes
        if self._bytes_per_second is not None:
            left = num_bytes / self._bytes_per_second - (time.perf_counter() - copy.begin)
            time.sleep(max(0.0, left))
        copy.end = time.perf_counter()
        self.busy_seconds += copy.end - copy.begin


class Turns:
    """Order of a plan's transfers: a copy asked for early waits until those before it were.

    Belongs to the main thread. A copy that somebody waits for is never held back.
    """

    def __init__(self, link: CopyLink, order: Iterable[Transfer]) -> None:
        self._link = link
        self._order = list(reversed(list(order)))
        self._listed = set(self._order)
        self._ready: dict[Transfer, Copy] = {}

    def ask(self, transfer: Transfer, copy: Copy) -> None:
        """Ask for a copy in its turn; one that the plan does not list goes at once."""
        if transfer not in self._listed:
            self._link.ask(copy)
            return
        self._ready[transfer] = copy
        while self._order and (self._order[-1] in self._ready or self._is_past(self._order[-1])):
            following = self._order.pop()
            if following in self._ready:
                self._submit(following)

    def wait(self, transfer: Transfer, copy: Copy) -> None:
        """Wait for a copy, in its turn or not."""
        if self._ready.get(transfer) is copy:
            self._submit(transfer)
        self._link.wait(copy)

    def abandon(self) -> None:
        """Follow the order no longer: ask for all that waits, and hold nothing back from now on."""
        for transfer in list(self._ready):
            self._submit(transfer)
        self._order, self._listed = [], set()

    def _submit(self, transfer: Transfer) -> None:
        self._listed.discard(transfer)
        self._link.ask(self._ready.pop(transfer))

    def _is_past(self, transfer: Transfer) -> bool:
        return transfer not in self._listed
