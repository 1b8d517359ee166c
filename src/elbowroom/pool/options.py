"""Settings of a pool that its plan does not hold: they belong to the engine and the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from elbowroom.core.errors import PoolError
from elbowroom.pool.housekeeper import STREAM_TIMEOUT_SECONDS
from elbowroom.pool.layer import Forward
from elbowroom.pool.leases import Reduce
from elbowroom.pool.shipping import SHIP_TIMEOUT_SECONDS
from elbowroom.pool.turns import Turns

PEER_TIMEOUT_SECONDS = 600.0
"""Seconds to wait until a peer publishes a layer: reading a large model takes minutes."""


class TensorParallel(NamedTuple):
    """The two functions that shipping needs where ranks of a replica hold parts of each matrix.

    ``partial`` gives a feed-forward module's forward without the sum over its ranks. Its result
    goes back to the rank that asked, and ``reduce`` sums over the ranks of that one's replica.
    """

    partial: Callable[[nn.Module], Forward]
    reduce: Reduce


@dataclass(frozen=True)
class PoolOptions:
    """Settings of a pool that its plan does not hold.

    Raises PoolError for ``turns`` with ``tensor_parallel``: ranks of a replica wait for each other
    amid a pass, and one that waits so would serve nobody, though its peer waits for its owner.

    ``run_dir`` is where rows are shipped through, if the share says that they may be; without it
    none are. ``dtype`` is that of rows, None where weights have the same.
    ``link_bytes_per_second`` holds streaming back, see ``Housekeeper``. ``turns`` are those of one
    replica, for modules that cannot be run for peers beside its forward passes: whoever runs passes
    puts ``turns.forward_pass()`` around each, before it sets up what such modules ask for.
    """

    run_dir: Path | None = None
    tensor_parallel: TensorParallel | None = None
    dtype: torch.dtype | None = None
    link_bytes_per_second: float = float("inf")
    peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS
    stream_timeout_seconds: float = STREAM_TIMEOUT_SECONDS
    ship_timeout_seconds: float = SHIP_TIMEOUT_SECONDS
    turns: Turns | None = None

    def __post_init__(self) -> None:
        if self.turns is not None and self.tensor_parallel is not None:
            raise PoolError(
                "ranks of one replica wait for each other amid a forward pass, and cannot serve "
                "peers between its layers alone: leave out turns, or tensor_parallel"
            )
