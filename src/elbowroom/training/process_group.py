"""The process group of the workers that torchrun starts, and may start again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous


def join_workers(timeout_seconds: float) -> None:
    """Make the default process group, over gloo, of all workers that torchrun has started.

    Torchrun keeps its store when it starts workers again (torch 2.13), with the addresses of those
    that are gone, which a worker may read before its peers write theirs. So each start has names
    of its own, where all workers are of one torchrun and count alike.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store, worker, num_workers = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(num_workers):
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"start-{start}", store)  # type: ignore[attr-defined]
    distributed.init_process_group(
        "gloo", store=store, rank=worker, world_size=num_workers, timeout=timeout
    )


def group_for_messages() -> distributed.ProcessGroup:
    """Another gloo group of all workers, whose thread does not interrupt those that send.

    It waits as long as the default group does. Every worker must call it, after the same groups.

    A gloo group has a thread that reads from all connections, and a lock for each of them. A worker
    that sends a message holds the lock, and is often interrupted right then: by that thread, which
    the answer wakes. It cannot have the lock, polls for it until the kernel takes its core away, 3
    ms later, and nobody sends. Where workers have a core each, or less, a step of many messages
    took 1.3 to 1.5 times as long (``bench.grid_peers``).
    """
    default = distributed.group.WORLD
    assert default is not None, "workers have joined the default group"
    timeout = default._get_backend(torch.device("cpu")).options._timeout
    with _patient_threads():
        group = distributed.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, distributed.ProcessGroup)
    return group


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Threads that are made meanwhile run when a core is free, not when they wake, on Linux."""
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # not allowed, as in some sandboxes
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
