"""Iteration time in each mode of a pool, and the batch at which streaming beats shipping.

SiDP leaves the threshold open ("the smallest batch whose forward time hides the fetch"). Here the
modes are compared directly. With local compute C(B), the time F to fetch all borrowed layers, and
round trips R(B) of their activations:

    local     C(B)
    streamed  max(C(B), F)            where copies overlap, else C(B) + F
    shipped   C(B) - FFN(B) + FFN(J) + R(B)
    mixed     min over the shipped share x of max(compute(x), (1 - x) F)

with J the rows that an owner joins, of all replicas that ship at once: d B, or fewer where some are
idle. B_th is the smallest batch at which streaming takes no longer than shipping. While F > C, that
is C(B) >= F - [FFN(J) - FFN(B) + R(B)]: streaming pays before the fetch is fully hidden, by as much
as a ship costs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.pool.timeline import link_share

Mode = Literal["local", "mapped", "streamed", "shipped", "mixed"]
Seconds = TypeVar("Seconds", float, NDArray[np.float64])
_MAX_BATCH = 1 << 17


class ModeTimes(NamedTuple):
    """Seconds of one iteration in each mode."""

    local: float
    mapped: float
    streamed: float
    shipped: float
    mixed: float


@dataclass(frozen=True)
class PoolTimes:
    """Iteration times of a replica in a pool of ``num_ranks`` replicas, in steady state.

    ``num_slots`` decides which share of its link a reader gets; None takes the whole link. In
    methods that ship, ``joined_rows`` None means this replica's rows times ``num_ranks``.
    """

    cost: CostModel
    num_ranks: int
    num_slots: int | None = None

    def times(self, batch: Batch) -> ModeTimes:
        local = self.cost.iteration(batch).total
        return ModeTimes(
            local=local,
            mapped=self.mapped_seconds(batch, local),
            streamed=self.stream_seconds(local),
            shipped=self.ship_seconds(batch, local),
            mixed=self.mixed_seconds(batch, local),
        )

    def mapped_seconds(self, batch: Batch, local_seconds: float) -> float:
        """Seconds where kernels read the owner's memory directly.

        Equal to local compute where devices read peers as fast as themselves (``maps_peers``);
        otherwise the FFNs of borrowed layers take at least the time to fetch them.
        """
        if self.cost.cluster.device.maps_peers or self.num_ranks == 1:
            return local_seconds
        ffn = self.cost.ffn_seconds(batch.num_tokens) * self._borrowed
        return local_seconds - ffn + max(ffn, self.fetch_seconds)

    def stream_seconds(self, local_seconds: Seconds) -> Seconds:
        """Seconds of compute, plus the fetch where copies do not hide it (SiDP section 4.2)."""
        if self.cost.cluster.device.copies_overlap:
            hidden: Seconds = np.maximum(local_seconds, self.fetch_seconds)
            return hidden
        return local_seconds + self.fetch_seconds

    def ship_seconds(
        self, batch: Batch, local_seconds: float, joined_rows: float | None = None
    ) -> float:
        """Seconds with borrowed layers shipped, and owners that run the rows of all at once."""
        if self.num_ranks == 1:
            return local_seconds
        return local_seconds + self._ship_extra_seconds(batch.num_tokens, joined_rows)

    def mixed_seconds(
        self, batch: Batch, local_seconds: float, joined_rows: float | None = None
    ) -> float:
        """Seconds when shipping just the share x of borrowed layers whose fetch is not hidden.

        compute(x) grows in x and (1 - x) F falls, so the best x is where they meet.
        """
        fetch = self.fetch_seconds
        if self.num_ranks == 1 or not self.cost.cluster.device.copies_overlap:
            shipped = self.ship_seconds(batch, local_seconds, joined_rows)
            return min(self.stream_seconds(local_seconds), shipped)
        if local_seconds >= fetch:
            return local_seconds
        extra = self._ship_extra_seconds(batch.num_tokens, joined_rows)
        share = min(1.0, (fetch - local_seconds) / (fetch + extra))
        return max(local_seconds + share * extra, (1 - share) * fetch)

    @cached_property
    def fetch_seconds(self) -> float:
        """F: seconds to fetch all borrowed layers, with the link share that other readers leave."""
        seconds = self.cost.fetch_seconds(self.num_ranks)
        if not self.num_slots or self.num_ranks == 1:
            return seconds
        return seconds / _link_share(self.cost, self.num_ranks, self.num_slots)

    def threshold_batch(self, context_tokens_per_row: float) -> int | None:
        """B_th, the smallest decode batch at which streaming takes no longer than shipping.

        None if shipping is faster at every batch up to 131,072 rows.
        """

        def streams(rows: int) -> bool:
            times = self.times(Batch(rows, rows * context_tokens_per_row))
            return times.streamed <= times.shipped

        return smallest(streams)

    def hiding_batch(self, context_tokens_per_row: float) -> int | None:
        """The paper's threshold: the smallest decode batch whose compute hides the whole fetch.

        None if no batch up to 131,072 rows does.
        """

        def hides(rows: int) -> bool:
            batch = Batch(rows, rows * context_tokens_per_row)
            return self.cost.iteration(batch).total >= self.fetch_seconds

        return smallest(hides)

    @property
    def _borrowed(self) -> float:
        """Fraction of the layers that other replicas own."""
        return (self.num_ranks - 1) / self.num_ranks

    def _ship_extra_seconds(self, rows: float, joined_rows: float | None) -> float:
        joined = rows * self.num_ranks if joined_rows is None else max(rows, joined_rows)
        waiting = self.cost.ffn_seconds(joined) - self.cost.ffn_seconds(rows)
        trips = self.cost.model.num_layers * self.cost.round_trip_seconds(rows, self.num_ranks)
        return waiting + trips * self._borrowed


@cache
def _link_share(cost: CostModel, num_ranks: int, num_slots: int) -> float:
    if not cost.cluster.device.copies_overlap:
        return 1.0  # its bandwidth was measured while all devices copied
    return link_share(cost, num_ranks, num_slots)


def smallest(holds: Callable[[int], bool]) -> int | None:
    """The smallest batch for which ``holds``, if it holds from there on; None beyond the limit."""
    if not holds(_MAX_BATCH):
        return None
    return 1 + bisect_left(range(1, _MAX_BATCH), True, key=holds)
