"""Turns on the modules of a replica, for modules that one thread at a time can run.

A forward pass and the thread that serves peers (``serving``) take turns. Some engines keep state of
the pass under way in a global of their module, vLLM its forward context: a module that asks for it
cannot run on one thread while another is amid a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Context = Callable[[int], AbstractContextManager[object]]
"""A function that gives the surroundings in which modules run a number of rows."""


def no_context(num_rows: int) -> AbstractContextManager[object]:
    """Surroundings of modules that need none."""
    return nullcontext()


class Turns:
    """The turns of one replica: a forward pass has its turn to its end, and pauses for peers.

    Between the layers of a pass the thread that computes serves what waits, so a long pass starves
    no peer. While it waits for a peer itself it pauses, so that two replicas which wait for each
    other are both served. A pass goes before the server's thread: it waits for one layer at most.

    ``context`` is put around every module that is run for peers, in either thread.
    """

    def __init__(self, context: Context = no_context) -> None:
        self.context = context
        self._changed = threading.Condition()
        self._in_pass = False
        self._is_serving = False
        self._depth = 0  # touched by the thread that computes alone
        self._opened: Callable[[], None] | None = None

    def when_open(self, call: Callable[[], None]) -> None:
        """Have ``call`` called whenever a pass ends or pauses, by the thread that computes."""
        self._opened = call

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Have the turn, for a whole pass. One thread computes; within a pass this does nothing.

        Waits for the layer that is being served. However the pass ends, its turn does.
        """
        self._depth += 1
        try:
            if self._depth == 1:
                self._close()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._open()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let peers be served amid a pass; without one this does nothing."""
        if self._depth == 0:
            yield
            return
        self._open()
        try:
            yield
        finally:
            self._close()

    def try_serve(self) -> bool:
        """Take the server's turn, until ``end_serving``. False while a pass has it."""
        with self._changed:
            if self._in_pass:
                return False
            self._is_serving = True
            return True

    def end_serving(self) -> None:
        """End the server's turn, and wake a pass that waits for it."""
        with self._changed:
            self._is_serving = False
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._in_pass = True  # before the wait: the server begins no other layer
            while self._is_serving:
                self._changed.wait()

    def _open(self) -> None:
        with self._changed:
            self._in_pass = False
        if self._opened is not None:
            self._opened()
