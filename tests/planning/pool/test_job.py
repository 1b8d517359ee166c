"""Whole jobs: every row is answered once, limits hold, and the closed form is met."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.workload import parse_lengths, workload
from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.pool.job import Policy, ReplicaLimits, simulate_job
from elbowroom.planning.pool.modes import PoolTimes
from tests.examples import examples
from tests.planning.facts import CPU, H20, model

SMALL, QWEN = model("Llama-3.1-8B"), model("Qwen3-32B")
POLICIES: tuple[Policy, ...] = get_args(Policy)
LENGTHS = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300)), min_size=1, max_size=40)


@examples(80)
@given(
    LENGTHS,
    st.integers(1, 4),
    st.sampled_from(POLICIES),
    st.integers(1, 16),
    st.integers(1, 512),
    st.integers(1, 8),
)
def test_laws(
    lengths: list[tuple[int, int]],
    num_replicas: int,
    policy: Policy,
    max_num_seqs: int,
    budget: int,
    rows_of_room: int,
) -> None:
    rows = workload(*zip(*lengths, strict=True))
    limits = ReplicaLimits(1216 * rows_of_room, max_num_seqs, budget)
    cost = CostModel(SMALL, H20)
    job = simulate_job(PoolTimes(cost, num_replicas), limits, rows, num_replicas, policy)
    assert job.output_tokens == rows.num_output_tokens
    assert sum(replica.num_rows for replica in job.replicas) == rows.num_rows
    for replica in job.replicas:
        assert replica.peak_rows <= max_num_seqs
        assert replica.peak_kv_tokens <= limits.num_kv_tokens
        assert replica.num_iterations == sum(replica.mode_iterations.values())
    # Each token was computed by an iteration that was not faster than the fastest possible.
    longest = int(rows.output_tokens.max())
    least = cost.iteration(Batch(1, 0)).total
    assert job.seconds >= longest * least * (1 - 1e-9)
    again = simulate_job(PoolTimes(cost, num_replicas), limits, rows, num_replicas, policy)
    assert again == job, "deterministic"


def test_one_replica_one_row_is_the_closed_form() -> None:
    cost = CostModel(SMALL, CPU)
    job = simulate_job(PoolTimes(cost, 1), ReplicaLimits(4096), workload([100], [50]), 1, "local")
    by_hand = cost.iteration(Batch(0, 0, 100, 100 * 50, 1)).total
    by_hand += sum(cost.iteration(Batch(1, 101 + step)).total for step in range(49))
    assert job.seconds == pytest.approx(by_hand)
    assert job.replicas[0].num_iterations == 50


def test_prompts_are_taken_in_chunks_beside_decode_rows() -> None:
    cost = CostModel(SMALL, CPU)
    limits = ReplicaLimits(8192, max_num_batched_tokens=64)
    job = simulate_job(PoolTimes(cost, 1), limits, workload([640, 64], [2, 2]), 1, "local")
    chunks = [segment.prefill_tokens for segment in job.segments if segment.prefill_tokens]
    # The second prompt shares its second chunk with the first row, which decodes.
    assert chunks == [64] * 10 + [63, 1]


def test_replicas_pull_so_that_none_idles_while_rows_wait() -> None:
    rows = parse_lengths("64-512:16-256x400").longest_first()
    cost = CostModel(SMALL, H20)
    job = simulate_job(PoolTimes(cost, 1), ReplicaLimits(40_000, 32), rows, 4, "local")
    ends = [replica.finish_seconds for replica in job.replicas]
    assert min(ends) > 0.9 * max(ends)


def test_a_faster_replica_takes_more_rows() -> None:
    rows = parse_lengths("64:128x600")
    times = PoolTimes(CostModel(SMALL, H20), 1)
    job = simulate_job(times, ReplicaLimits(40_000, 32), rows, 2, "local", speeds=(1.0, 2.0))
    assert job.replicas[1].num_rows > 1.5 * job.replicas[0].num_rows


def test_a_job_of_a_group_streams_and_its_tail_ships() -> None:
    """SiDP section 6: over 90 % of iterations stream."""
    rows = parse_lengths("1024:256-768x4000").longest_first()
    times = PoolTimes(CostModel(QWEN, H20, 2), 4, num_slots=3)
    limits = ReplicaLimits(500_000, 512)
    jobs = {
        p: simulate_job(times, limits, rows, 4, p) for p in ("streamed", "per-replica", "shipped")
    }
    chosen = jobs["per-replica"]
    assert chosen.seconds <= min(jobs["streamed"].seconds, jobs["shipped"].seconds) * 1.001
    assert chosen.mode_share("streamed") > 0.9
    last = [s.mode for s in chosen.segments if s.end > 0.999 * chosen.seconds]
    assert "shipped" in last


def test_a_row_that_never_fits_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match="longest row has 5000 tokens"):
        simulate_job(
            PoolTimes(CostModel(SMALL, H20), 1),
            ReplicaLimits(4096),
            workload([4000], [1000]),
            1,
            "local",
        )


def test_rows_are_not_changed() -> None:
    rows = parse_lengths("10-20:5-9x30")
    before = rows.prompt_tokens.copy()
    simulate_job(PoolTimes(CostModel(SMALL, H20), 1), ReplicaLimits(4096), rows, 2, "local")
    assert np.array_equal(rows.prompt_tokens, before)
