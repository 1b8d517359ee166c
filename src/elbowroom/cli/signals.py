"""What SIGINT, SIGTERM and SIGHUP do while something runs."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from elbowroom.jobs.job import StopRequest

T = TypeVar("T")


def heard() -> set[signal.Signals]:
    """Signals that stop what runs, also where a script's shell ignores SIGINT for what it starts.

    None of them outside the main thread, where Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return set()
    numbers = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.add(signal.SIGHUP)  # which nohup has ignored
    return numbers


class Signals:
    """SIGINT, SIGTERM and SIGHUP: the first asks a job to stop, the second ends it.

    While nobody hears a request, because the job reads, plans, measures or writes, the first
    interrupts that. The ways of before come back with the end, and with the second interruption.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._before: dict[signal.Signals, Any] = {}
        self._task: asyncio.Task[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._received) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def watch(self, job: Coroutine[Any, Any, T]) -> T:
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        return await job

    def _received(self, number: int, _: object) -> None:
        reason = f"stopped by {signal.Signals(number).name}"
        if not self._stop.is_heard:
            self.__exit__()
            raise KeyboardInterrupt(reason)  # what takes every Exception lets it pass
        if self._stop.reason is None:
            self._stop(reason)
        elif self._task is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
