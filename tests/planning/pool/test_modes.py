"""Stream, ship, mixed: never better than their bounds, and thresholds are where times cross."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.cluster_file import read_cluster
from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.pool.modes import PoolTimes
from tests.examples import examples
from tests.planning.facts import CPU, H20, model

LLAMA = model("Llama-3.1-70B")


@examples(60)
@given(st.integers(1, 2048), st.integers(2, 8), st.sampled_from(["h20-8", "h200-8", "b200-8"]))
def test_bounds(rows: int, num_ranks: int, name: str) -> None:
    pool = PoolTimes(CostModel(LLAMA, read_cluster(name)), num_ranks)
    times = pool.times(Batch(rows, rows * 1024))
    rounding = 1e-9 * times.local
    assert min(times) >= times.local - rounding
    assert times.streamed >= pool.fetch_seconds
    assert times.mixed <= min(times.streamed, times.shipped) + rounding


def test_one_rank_has_nothing_to_borrow() -> None:
    times = PoolTimes(CostModel(LLAMA, H20), 1).times(Batch(16, 16_000))
    assert set(times) == {times.local}


def test_thresholds_are_where_the_times_cross() -> None:
    pool = PoolTimes(CostModel(LLAMA, H20, 2), 2)
    threshold, hiding = pool.threshold_batch(1024), pool.hiding_batch(1024)
    assert threshold is not None
    assert hiding is not None
    assert threshold < hiding, "streaming pays before it is fully hidden"

    def times(rows: int) -> tuple[float, float, float]:
        at = pool.times(Batch(rows, rows * 1024))
        return at.local, at.streamed, at.shipped

    _, stream, ship = times(threshold)
    assert stream <= ship
    _, stream, ship = times(threshold - 1)
    assert stream > ship
    local, stream, _ = times(hiding)
    assert stream == local
    local, stream, _ = times(hiding - 1)
    assert stream > local


def test_shipping_wins_up_to_32_rows_and_streaming_is_free_at_128() -> None:
    """SiDP section 6: Llama-70B, H20, TP2/DP2, 1K."""
    pool = PoolTimes(CostModel(LLAMA, H20, 2), 2)
    for rows in (1, 8, 32):
        times = pool.times(Batch(rows, rows * 1024))
        assert times.shipped < times.streamed
    times = pool.times(Batch(128, 128 * 1024))
    assert times.streamed == pytest.approx(times.local)


def test_where_copies_cost_compute_streaming_is_never_free() -> None:
    pool = PoolTimes(CostModel(LLAMA, CPU), 2, num_slots=1)
    times = pool.times(Batch(64, 64 * 1024))
    assert times.streamed == pytest.approx(times.local + pool.fetch_seconds)
    assert times.mapped == times.local
    assert pool.hiding_batch(0) is not None


def test_a_link_that_is_never_hidden_has_no_threshold() -> None:
    slow = replace(H20.links[0], bandwidth=replace(H20.links[0].bandwidth, peak=1e6))
    pool = PoolTimes(CostModel(LLAMA, replace(H20, links=(slow,))), 2)
    assert pool.hiding_batch(1024) is None
