"""Counters of a pool over restarts."""

from __future__ import annotations

from elbowroom.pool.stats import PoolStats


def test_a_replica_that_was_started_again() -> None:
    """It holds what it holds now, and has done what both its lives did."""
    first = PoolStats(owned_bytes=5, mapped_bytes=3, streamed_bytes=10, shipped_rows=2)
    second = PoolStats(owned_bytes=4, mapped_bytes=2, streamed_bytes=7, wait_seconds=0.5)
    assert second.after(first) == PoolStats(
        owned_bytes=4, mapped_bytes=2, streamed_bytes=17, shipped_rows=2, wait_seconds=0.5
    )
