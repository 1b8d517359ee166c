"""All-reduce of gradients: after each round the replicas of a stage have the mean of theirs.

A parameter to which no replica has a gradient has none afterwards, as in plain training: an
optimizer leaves it alone. To one that some have, the others add zeros.

Gradients gather in buckets, and a bucket that is full is averaged on a thread of its own while the
backward pass goes on, as in Li et al., PyTorch Distributed (2020), section 3.2.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from elbowroom.core.errors import PeerLostError
from elbowroom.pipeline.ring import Ring

_register_hook: Callable[[torch.Tensor, Callable[[torch.Tensor], None]], RemovableHandle]
_register_hook = torch.Tensor.register_hook


class Replicas:
    """One worker's side of the gradient all-reduce between all ``workers`` of its stage.

    All of them train these parameters. A bucket has ``bucket_bytes`` at most, or one parameter.
    """

    def __init__(
        self,
        workers: Sequence[int],
        worker: int,
        parameters: Mapping[str, torch.Tensor],
        bucket_bytes: int,
    ) -> None:
        self._workers = workers
        self._is_alone = len(workers) == 1
        self._ring = Ring(workers, worker)
        groups = [] if self._is_alone else _groups(parameters, bucket_bytes)
        self._buckets = [_Bucket(group) for group in groups]
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.slots}
        self._open = deque(self._buckets)
        self._given: set[str] = set()  # gradients that this replica has in the round
        self._tasks: queue.SimpleQueue[_Bucket | int | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="replicas", daemon=True)
        if not self._is_alone:
            self._thread.start()

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Bytes of gradients sent to each other worker."""
        return self._ring.sent_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that other replicas' gradients are received in."""
        return self._ring.buffer_bytes

    def tell(self, num_minibatches: int) -> None:
        """Have the gradients of a round averaged over all minibatches, of which these are run here.

        Every replica calls it in every round, before it has gradients, or none ever does: then the
        all-reduce gives sums.
        """
        if not self._is_alone:
            self._tasks.put(num_minibatches)

    @contextmanager
    def watch(self, leaves: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Send gradients of these leaves while autograd, within this context, computes others.

        They must be all gradients that this replica has in its round.
        """
        watched = {} if self._is_alone else leaves
        hooks = [_register_hook(leaf, partial(self._put, name)) for name, leaf in watched.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def all_reduce(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """End a round: the reduced gradients of parameters, valid until the next round begins.

        What was not watched is taken from ``gradients``. Parameters without a gradient on any
        replica are left out. A single worker gets its own. Raises PeerLostError when another
        replica is gone.
        """
        if self._is_alone:
            return dict(gradients)
        for name in [name for bucket in self._open for name in bucket.missing]:
            self._put(name, gradients.get(name))
        for _ in self._buckets:
            failure = self._finished.get()
            if failure is not None:
                raise self._lost() from failure
        for bucket in self._buckets:
            bucket.missing = set(bucket.slots)
        self._open = deque(self._buckets)
        every = {name: bucket.slots[name] for name, bucket in reversed(self._bucket_of.items())}
        given, self._given = self._given, set()
        absent = self._absent([name for name, one in every.items() if _is_zero(one)], given)
        return {name: one for name, one in every.items() if name not in absent}

    def close(self) -> None:
        """End the thread; call it between rounds."""
        if not self._is_alone:
            self._tasks.put(None)
            self._thread.join()

    def _absent(self, zeros: list[str], given: set[str]) -> set[str]:
        """Parameters, of those whose sum is zero, to which no replica has a gradient.

        The replicas have the same sums, and so ask each other in the same rounds, which are few.
        """
        if not zeros:
            return set()
        counts = torch.tensor([name in given for name in zeros], dtype=torch.int64)
        try:
            totals = self._ring.add_counts(counts).tolist()
        except RuntimeError as error:
            raise self._lost() from error
        return {name for name, total in zip(zeros, totals, strict=True) if not total}

    def _lost(self) -> PeerLostError:
        workers = ", ".join(map(str, self._workers))
        return PeerLostError(f"one of workers {workers} ended: see their output")

    def _put(self, name: str, gradient: torch.Tensor | None) -> None:
        """Put a gradient into its bucket, and send full ones, in the same order everywhere."""
        bucket = self._bucket_of[name]
        if gradient is None:
            bucket.slots[name].zero_()
        else:
            bucket.slots[name].copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            self._given.add(name)
        bucket.missing.discard(name)
        while self._open and not self._open[0].missing:
            self._tasks.put(self._open.popleft())

    def _run(self) -> None:
        divisor = 1
        try:
            while (task := self._tasks.get()) is not None:
                if isinstance(task, int):
                    divisor = int(self._ring.add_counts(torch.tensor(task)))
                else:
                    self._ring.average(task.whole, divisor)
                    self._finished.put(None)
        except Exception as error:  # handed to whoever waits for a bucket
            self._finished.put(error)


class _Bucket:
    """Gradients that share memory and are reduced at once: ``slots`` are parts of ``whole``."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        sizes = [one.numel() for one in parameters.values()]
        self.whole = next(iter(parameters.values())).detach().new_empty(sum(sizes))
        parts = zip(parameters.items(), torch.split(self.whole, sizes), strict=True)
        self.slots = {name: part.view(one.shape) for (name, one), part in parts}
        self.missing = set(self.slots)


def _is_zero(tensor: torch.Tensor) -> bool:
    return not tensor.flatten()[:1].any() and not tensor.any()  # the first number tells most


def _groups(
    parameters: Mapping[str, torch.Tensor], bucket_bytes: int
) -> list[dict[str, torch.Tensor]]:
    """Parameters of one type each for a bucket, the last first, as a backward comes to them."""
    groups: list[dict[str, torch.Tensor]] = []
    dtype, num_bytes = None, 0
    for name, parameter in reversed(list(parameters.items())):
        num_bytes += parameter.nbytes
        if parameter.dtype != dtype or num_bytes > bucket_bytes:
            groups.append({})
            dtype, num_bytes = parameter.dtype, parameter.nbytes
        groups[-1][name] = parameter
    return groups
