"""All-reduce of a step's gradients among data-parallel replicas: its buckets and their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from elbowroom.core.errors import InputError
from elbowroom.core.step_profile import ReadyGradient
from elbowroom.core.units import MIB

DDP_BUCKET_BYTES = 25 * MIB
"""``bucket_cap_mb`` of torch.nn.parallel.DistributedDataParallel, as it is by default."""

DDP_FIRST_BUCKET_BYTES = MIB
"""``torch.distributed._DEFAULT_FIRST_BUCKET_BYTES``, with which DDP begins early."""


class Bucket(NamedTuple):
    """Gradients that are all-reduced together, of which the last is ready during ``tick``."""

    tick: int
    num_bytes: int


@dataclass(frozen=True)
class GradientReduction:
    """How replicas average their gradients while the backward goes on.

    Buckets are filled and reduced as DDP does from its second step on: gradients in the order in
    which they come, one bucket after the other, each by a ring.

    Args:
        num_workers: replicas, this one included.
        bandwidth: bytes per second that one worker sends over the network while it receives as
            many.
        bucket_bytes: size at which a bucket is full; the gradient that fills it is in it.
        first_bucket_bytes: the same for the first bucket. Where DDP is given ``bucket_cap_mb``, it
            is ``bucket_bytes``.
        shares_link: whether what is sent and received also crosses the link to the slow tier, as
            where the network hangs on the host.

    Raises InputError for fewer than one worker, and for rates and sizes that are not above 0.

    """

    num_workers: int
    bandwidth: float
    bucket_bytes: int = DDP_BUCKET_BYTES
    first_bucket_bytes: int = DDP_FIRST_BUCKET_BYTES
    shares_link: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1 or not 0 < self.bandwidth < float("inf"):
            raise InputError(
                f"{self.num_workers} replicas at {self.bandwidth:g} bytes/s: give one or more, and "
                "a bandwidth above 0"
            )
        if self.bucket_bytes < 1 or self.first_bucket_bytes < 1:
            raise InputError(
                f"buckets of {self.first_bucket_bytes} and {self.bucket_bytes} bytes: both must be "
                "above 0"
            )

    def buckets(self, gradients: Iterable[ReadyGradient]) -> list[Bucket]:
        """Buckets in the order in which they are full; the last one has what is left."""
        buckets: list[Bucket] = []
        size, limit, tick = 0, self.first_bucket_bytes, 0
        for gradient in gradients:
            size, tick = size + gradient.num_bytes, gradient.tick
            if size >= limit:
                buckets.append(Bucket(tick, size))
                size, limit = 0, self.bucket_bytes
        return [*buckets, Bucket(tick, size)] if size else buckets

    def sent_bytes(self, num_bytes: int) -> float:
        """What one worker sends to reduce so many bytes, and receives: 2 (m - 1) / m of them.

        Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009.
        """
        return 2 * (self.num_workers - 1) / self.num_workers * num_bytes
