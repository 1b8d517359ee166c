"""Layouts of a model on a cluster, and what follows from one: memory, shares, limits, times."""

from __future__ import annotations

from collections.abc import Iterator
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


NOT_BETWEEN_GPUS = "no pool has been run between several GPUs"
"""Why pools are planned for clusters of GPUs, and run on CPUs and by replicas that share a GPU."""


MIXTURES_POOL = "the experts of a mixture are not divided in a pool"
"""Why such layouts of mixtures are planned and not run: pools hold experts' matrices whole."""


def enumerate_layouts(
    model: ModelFacts, cluster: Cluster, num_slots: int | None = None
) -> Iterator[Layout]:
    """Layouts that use every device: t x d x groups, with pools within the nearest links.

    Tensor parallelism t takes powers of two that divide the heads. A streamed or shipped pool gets
    ``num_slots`` slots, by default both 2 and d-1: one slot hides nothing. Pipelines have a stage
    on each of several nodes; the experts of a mixture are divided among the replicas of a node.
    """
    width = 1
    while width <= cluster.node_devices:
        if cluster.num_devices % width == 0 and model.divides_among(width):
            replicas = cluster.num_devices // width
            yield Layout(width, 1, replicas, "none")
            yield from _not_run(model, cluster, width, replicas)
            for ranks in range(2, cluster.node_devices // width + 1):
                if replicas % ranks == 0 and ranks <= model.num_layers:
                    yield from _pools(width, ranks, replicas // ranks, cluster, num_slots)
        width *= 2


def _not_run(model: ModelFacts, cluster: Cluster, width: int, replicas: int) -> Iterator[Layout]:
    """Layouts that others run, to compare with: no pool holds more of a model than these."""
    num_nodes = cluster.num_devices // cluster.node_devices
    for stages in range(2, num_nodes + 1):
        if num_nodes % stages == 0 and replicas % stages == 0 and stages <= model.num_layers:
            yield Layout(width, 1, replicas // stages, "none", pipeline_parallel=stages)
    ranks = cluster.node_devices // width
    if model.num_experts and ranks > 1 and replicas % ranks == 0:
        yield Layout(width, ranks, replicas // ranks, "none", expert_parallel=True)


def _pools(
    width: int, ranks: int, groups: int, cluster: Cluster, num_slots: int | None
) -> Iterator[Layout]:
    if cluster.device.maps_peers:
        yield Layout(width, ranks, groups, "mapped")
    for slots in [num_slots] if num_slots else sorted({2, max(2, ranks - 1)}):
        yield Layout(width, ranks, groups, "streamed", slots)
        yield Layout(width, ranks, groups, "shipped", slots)


def why_not_run(model: ModelFacts, cluster: Cluster, layout: Layout) -> str | None:
    """Why this version cannot run a layout; None where it can."""
    if not layout.is_run:
        return "not run by this version"
    if layout.pool == "none":
        return None
    not_here = None if cluster.device.maps_peers else NOT_BETWEEN_GPUS
    return why_not_pooled(model, layout) or not_here


def why_not_pooled(model: ModelFacts, layout: Layout) -> str | None:
    """Why no pool of a layout can hold this model, whatever it runs on; None where one can."""
    if layout.pool == "none":
        return None
    if model.cannot_pool:
        return model.cannot_pool
    if layout.pool == "shipped" and model.cannot_ship:
        return model.cannot_ship
    return MIXTURES_POOL if model.experts and layout.tensor_parallel > 1 else None


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
        layout.pipeline_parallel,
        layout.expert_ranks,
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
    stages, experts = layout.pipeline_parallel, layout.expert_ranks
    cost = CostModel(model, cluster, layout.tensor_parallel, stages, experts)
    return PoolTimes(cost, 1 if layout.pool == "none" else layout.num_ranks, layout.num_slots)
