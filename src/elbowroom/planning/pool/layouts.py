"""What follows from one layout: its memory budget, shares, limits and times."""

from __future__ import annotations

from dataclasses import dataclass

from elbowroom.core.cluster import Cluster
from elbowroom.core.model import ModelFacts
from elbowroom.planning.cost import CostModel
from elbowroom.planning.pool.job import Policy, ReplicaLimits
from elbowroom.planning.pool.memory import divide_memory
from elbowroom.planning.pool.modes import PoolTimes
from elbowroom.planning.pool.shares import SHIP_ROWS, plan_shares
from elbowroom.plans.pool import EngineOptions, FetchOrder, Layout, MemoryBudget, PoolShare

USUAL_ROWS, USUAL_TOKENS = 256, 2048
"""Default rows at once and tokens of one iteration, where nothing is known of the job."""


@dataclass(frozen=True)
class EngineLimits:
    """Engine options that matter to a plan. None leaves a choice to the planner.

    Without ``activation_bytes`` the workspace is derived from the model. ``max_model_len`` is the
    longest row answered; None is what the model and the cache can hold.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    activation_bytes: int | None = None
    max_model_len: int | None = None

    @property
    def num_rows(self) -> int:
        return self.max_num_seqs or USUAL_ROWS

    @property
    def num_tokens(self) -> int:
        """Tokens of one iteration; vLLM wants room for a token of every row."""
        return self.max_num_batched_tokens or max(USUAL_TOKENS, self.num_rows)


def layout_budget(
    model: ModelFacts, layout: Layout, memory_bytes: int, engine: EngineLimits
) -> MemoryBudget:
    """Memory budget of one device, by the function that ``run`` uses."""
    return divide_memory(
        model,
        layout_shares(model, layout),
        memory_bytes,
        engine.num_tokens,
        engine.num_rows,
        layout.tensor_parallel,
        engine.activation_bytes,
    )


def layout_shares(
    model: ModelFacts,
    layout: Layout,
    order: FetchOrder = "peak-shift",
    ship_below_rows: int = 0,
) -> tuple[PoolShare, ...]:
    """Shares of one group's replicas; ``ship_below_rows`` is for layouts that ship."""
    return plan_shares(
        model.ffn_bytes(),
        layout.num_ranks,
        layout.pool,
        layout.num_slots or None,
        order,
        ship_bytes=SHIP_ROWS * model.hidden_size * model.dtype_bytes() if layout.ships else 0,
        ship_below_rows=ship_below_rows,
    )


def ship_threshold(
    model: ModelFacts, cluster: Cluster, layout: Layout, context_tokens: float
) -> int:
    """B_th for layouts that ship, 0 for others: the value for ``PoolShare.ship_below_rows``."""
    if not layout.ships or layout.num_ranks == 1:
        return 0
    times = pool_times(model, cluster, layout)
    return times.threshold_batch(context_tokens) or SHIP_ROWS


def engine_limits(options: EngineOptions) -> EngineLimits:
    return EngineLimits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
    )


def replica_limits(budget: MemoryBudget, engine: EngineLimits) -> ReplicaLimits:
    """Limits of a replica with this budget; the engine keeps one block for itself."""
    return ReplicaLimits(
        num_kv_tokens=max(0, budget.num_kv_tokens - budget.block_tokens),
        max_num_seqs=engine.num_rows,
        max_num_batched_tokens=engine.num_tokens,
        block_tokens=budget.block_tokens,
        groups=budget.kv_groups,
    )


def policy_of(layout: Layout) -> Policy:
    if layout.streams:
        return "per-replica" if layout.ships else "streamed"
    return "mapped" if layout.pool == "mapped" else "local"


def pool_times(model: ModelFacts, cluster: Cluster, layout: Layout) -> PoolTimes:
    cost = CostModel(model, cluster, layout.tensor_parallel)
    return PoolTimes(cost, layout.num_ranks, layout.num_slots)
