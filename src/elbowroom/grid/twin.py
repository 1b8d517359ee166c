"""Workers of a grid as threads of one process, to try a plan without processes."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from elbowroom.core.errors import PeerLostError
from elbowroom.grid.transport import Pending

T = TypeVar("T")


class Mailboxes:
    """Messages between threads: by sender, receiver and key.

    Those who put something in signal ``changed``; those who take wait for it, at most
    ``seconds``, and end when ``lost`` has been set by a thread that failed.
    """

    def __init__(self, seconds: float) -> None:
        self.changed = threading.Condition()
        self.boxes: dict[tuple[int, int, int], deque[torch.Tensor]] = defaultdict(deque)
        self.lost: int | None = None
        self.seconds = seconds

    def lose(self, worker: int) -> None:
        """Note that a worker failed, and wake all that wait."""
        with self.changed:
            self.lost = worker if self.lost is None else self.lost
            self.changed.notify_all()


class ThreadTransport:
    """Transport of a worker that is a thread; messages are copies."""

    def __init__(self, mailboxes: Mailboxes, worker: int, num_workers: int) -> None:
        self.worker, self.num_workers = worker, num_workers
        self._mailboxes = mailboxes

    def start(
        self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor], key: int
    ) -> Pending:
        copies = {peer: tensor.detach().clone() for peer, tensor in sends.items()}
        with self._mailboxes.changed:
            for peer, tensor in copies.items():
                self._mailboxes.boxes[self.worker, peer, key].append(tensor)
            self._mailboxes.changed.notify_all()
        return _Receiving(self._mailboxes, self.worker, dict(receives), key)

    def drain(self) -> None:
        pass


class _Receiving:
    def __init__(
        self, mailboxes: Mailboxes, worker: int, receives: dict[int, torch.Tensor], key: int
    ) -> None:
        self._mailboxes, self._worker = mailboxes, worker
        self._receives, self._key = receives, key

    def wait(self) -> None:
        for peer, tensor in self._receives.items():
            found = self._take(peer)
            assert (found.dtype, found.numel()) == (tensor.dtype, tensor.numel()), (
                "both know what is sent"
            )
            tensor.copy_(found)
        self._receives = {}

    def _take(self, peer: int) -> torch.Tensor:
        mailboxes = self._mailboxes
        with mailboxes.changed:
            box = mailboxes.boxes[peer, self._worker, self._key]
            mailboxes.changed.wait_for(
                lambda: bool(box) or mailboxes.lost is not None, mailboxes.seconds
            )
            if not box:
                raise PeerLostError(f"worker {self._worker} heard nothing of worker {peer}")
            return box.popleft()


def run_twin(
    num_workers: int, work: Callable[[ThreadTransport], T], seconds: float = 60.0
) -> list[T]:
    """What ``work`` returns for each worker's transport, each in a thread of its own.

    A worker waits for a message at most ``seconds``. Raises what the first thread to fail raised.
    """
    mailboxes = Mailboxes(seconds)
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(worker: int) -> None:
        try:
            results[worker] = work(ThreadTransport(mailboxes, worker, num_workers))
        except BaseException as error:
            failures.append(error)
            mailboxes.lose(worker)

    threads = [
        threading.Thread(target=run, args=(worker,), name=f"worker {worker}", daemon=True)
        for worker in range(num_workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[worker] for worker in range(num_workers)]
