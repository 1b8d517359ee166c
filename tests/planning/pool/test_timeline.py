"""Iterations of a pool, layer by layer: laws, the closed form, and what the paper reports."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.events import critical_path_seconds
from elbowroom.planning.pool.lowering import RESOURCES
from elbowroom.planning.pool.modes import PoolTimes
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.planning.pool.timeline import (
    PoolTimeline,
    iteration_actions,
    link_share,
    simulate_pool,
)
from elbowroom.plans.pool import FETCH_ORDERS, FetchOrder
from elbowroom.plans.pool_actions import Fetch, Release, Run, Ship, Wait
from tests.examples import examples
from tests.planning.facts import CPU, H20, model

QWEN, SMALL = model("Qwen3-32B"), model("Llama-3.1-8B")


def run(
    cost: CostModel,
    num_ranks: int,
    rows: int,
    num_slots: int | None = None,
    order: FetchOrder = "peak-shift",
    copies_at_once: int | None = None,
    num_iterations: int = 3,
) -> PoolTimeline:
    sizes = cost.model.ffn_bytes()
    shares = plan_shares(sizes, num_ranks, "streamed", num_slots, order, sizes[0] // 4)
    batches = [Batch(rows, rows * 1024)] * num_ranks
    return simulate_pool(
        cost, shares, batches, copies_at_once=copies_at_once, num_iterations=num_iterations
    )


def test_an_iteration_as_actions() -> None:
    share = plan_shares((4, 4, 4), 3, "streamed", 2)[1]
    actions = iteration_actions(share)
    assert " ".join(map(str, actions.compute)) == "R0A W0 R0F X0 R1A R1F R2A W2 R2F X2"
    assert actions.copies == (Fetch(2, 0, 1), Fetch(0, 0, 1))
    shipped = iteration_actions(share, frozenset({0, 1}))
    assert shipped.compute[:2] == (Run(0, "A"), Ship(0))
    assert Wait(0) not in shipped.compute
    assert Release(2) in shipped.compute
    assert shipped.copies == (Fetch(2, 0, 1),)


def test_one_replica_without_a_pool_is_the_closed_form() -> None:
    cost, batch = CostModel(QWEN, H20), Batch(32, 32 * 1024)
    shares = plan_shares(QWEN.ffn_bytes(), 1, "none")
    timeline = simulate_pool(cost, shares, [batch])
    assert timeline.iteration_seconds == pytest.approx(cost.iteration(batch).total)
    assert timeline.waits == (pytest.approx(0.0, abs=1e-9),)


@examples(25)
@given(
    st.integers(2, 5),
    st.integers(1, 5),
    st.sampled_from(FETCH_ORDERS),
    st.integers(1, 300),
    st.sampled_from([H20, CPU]),
    st.integers(1, 4),
)
def test_laws(
    num_ranks: int, num_slots: int, order: FetchOrder, rows: int, cluster: object, copies: int
) -> None:
    assert cluster in (H20, CPU)
    cost = CostModel(SMALL, H20 if cluster is H20 else CPU)
    if cluster is CPU:
        num_ranks = 2
    iterations = 2
    timeline = run(cost, num_ranks, rows, num_slots, order, copies, iterations)
    events = timeline.timeline
    slack = 1e-6 * (1 + events.seconds)
    assert events.seconds >= critical_path_seconds(events.tasks) - slack
    local = cost.iteration(Batch(rows, rows * 1024)).total
    fetched = cost.fetch_seconds(num_ranks) * num_ranks * iterations
    latencies = cost.cluster.links[0].latency_seconds * num_ranks * iterations * 32
    busy = [sum(events.busy_seconds[index :: len(RESOURCES)]) for index in range(3)]
    copying = 0 if cluster is H20 else fetched
    assert busy[0] == pytest.approx(local * num_ranks * iterations + copying, rel=0.05)
    assert busy[1] == pytest.approx(busy[2])
    # Layers do not always divide evenly: whole layers are what ranks fetch.
    layers = sum(
        1
        for share in plan_shares(SMALL.ffn_bytes(), num_ranks, "streamed", num_slots, order)
        for owner in share.owners
        if owner != share.rank
    )
    one = cost.fetch_layer_seconds(0, num_ranks) - cost.cluster.links[0].latency_seconds
    assert busy[2] == pytest.approx(layers * one * iterations)
    assert busy[2] <= fetched + latencies + slack
    assert all(seconds <= events.seconds + slack for seconds in events.busy_seconds)
    for rank in range(num_ranks):
        assert timeline.most_slots(rank) <= num_slots, "peak bytes stay within the budget"


@pytest.mark.parametrize(("num_ranks", "paper"), [(4, 2.5), (8, 3.4)])
def test_peak_shifting_pays(num_ranks: int, paper: float) -> None:
    """SiDP, Qwen3-32B on H20 at 1K: 2.5x at DP4, 3.4x at DP8; with a slot more than its d-1."""
    cost = CostModel(QWEN, H20)
    meeting = run(cost, num_ranks, 16, num_ranks - 1, "in-order", copies_at_once=1)
    shifted = run(cost, num_ranks, 16, num_ranks, "peak-shift", copies_at_once=1)
    gain = meeting.iteration_seconds / shifted.iteration_seconds
    assert 0.7 * paper < gain < 1.3 * paper


def test_copies_at_once_keep_the_link_busy() -> None:
    """Readers with one copy under way block each other; with d-1 they hardly do."""
    cost = CostModel(QWEN, H20)
    one = link_share(cost, 8, 7, copies_at_once=1)
    many = link_share(cost, 8, 7)
    assert one < 0.7
    assert many > 0.9
    assert link_share(cost, 8, 8, copies_at_once=1) > 0.95


def test_streaming_follows_the_closed_form_away_from_the_crossing() -> None:
    cost = CostModel(QWEN, H20)
    for num_ranks, rows in ((4, 8), (4, 256), (8, 8), (8, 256)):
        pool = PoolTimes(cost, num_ranks, num_slots=num_ranks - 1)
        closed = pool.times(Batch(rows, rows * 1024)).streamed
        simulated = run(cost, num_ranks, rows, num_ranks - 1).iteration_seconds
        assert simulated == pytest.approx(closed, rel=0.15)


def test_shipping_joins_rows_or_serves_each() -> None:
    """Joined, an owner reads its weights once; serving each costs it more, and nobody waits."""
    cost, num_ranks = CostModel(QWEN, H20), 4
    shares = plan_shares(QWEN.ffn_bytes(), num_ranks, "streamed")
    everything = frozenset(range(QWEN.num_layers))
    actions = [iteration_actions(share, everything) for share in shares]
    batches = [Batch(4, 4096)] * num_ranks
    joined = simulate_pool(cost, shares, batches, actions, joined=True)
    each = simulate_pool(cost, shares, batches, actions)
    assert joined.timeline.busy_seconds[0] < each.timeline.busy_seconds[0]
    expected = PoolTimes(cost, num_ranks).times(batches[0]).shipped
    assert joined.iteration_seconds == pytest.approx(expected, rel=0.1)


def test_spans_cover_compute_and_copies() -> None:
    spans = list(run(CostModel(SMALL, H20), 2, 8, num_iterations=1).spans())
    tracks = {(span.process, span.track) for span in spans}
    assert tracks == {
        (f"iteration, replica {rank}", track)
        for rank in (0, 1)
        for track in ("compute", "copies 0")
    }
    assert {"R0A", "R31F", "F1.0/1", "head"} <= {span.name for span in spans}


@pytest.mark.parametrize("joined", [True, False])
def test_spans_of_a_track_do_not_overlap(joined: bool) -> None:
    """Viewers drop those that do."""
    num_ranks = 4
    shares = plan_shares(QWEN.ffn_bytes(), num_ranks, "streamed")
    actions = [iteration_actions(share, frozenset(range(QWEN.num_layers))) for share in shares]
    batches = [Batch(4 * rank + 1, 4096) for rank in range(num_ranks)]
    timeline = simulate_pool(CostModel(QWEN, H20), shares, batches, actions, 2, joined=joined)
    tracks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for span in timeline.spans():
        tracks.setdefault((span.process, span.track), []).append((span.start, span.end))
    assert any("ship" in track for _, track in tracks)
    for spans in tracks.values():
        spans.sort()
        assert all(end <= start + 1e-12 for (_, end), (start, _) in pairwise(spans))
