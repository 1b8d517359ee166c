"""The process group of the workers that torchrun starts, and may start again."""

from __future__ import annotations

import os
from datetime import timedelta

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
