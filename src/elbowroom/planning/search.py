"""Enumerates layouts, times each on the job, and says which to take and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.model import ModelFacts
from elbowroom.core.plan import EngineOptions, FetchOrder, Layout, MemoryAccount, PoolShare
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload
from elbowroom.planning.cost import CostModel
from elbowroom.planning.job import Policy, ReplicaLimits, simulate_job
from elbowroom.planning.memory import account_memory
from elbowroom.planning.modes import PoolTimes
from elbowroom.planning.pool import SHIP_ROWS, plan_shares

SAMPLE_ROWS_PER_REPLICA = 300
"""Layouts are compared on at least so many rows of a long job. ``simulate`` runs every row."""

_COARSE, _FINE = 2, 8
_NUM_FINE, _MOST_REPLICAS = 2, 16
"""Times that a sample fills the replicas: for all layouts, then for the best of them.

Of more replicas than ``_MOST_REPLICAS``, one group stands for all also in a short job.
"""

_TIE = 0.01
"""Layouts whose finish differs by less are equal, and the one with the most KV tokens is taken."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine is told, of what matters to a plan. ``activation_bytes`` None is derived."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    activation_bytes: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A layout with its account and its predicted job, or what each device lacks for it."""

    layout: Layout
    account: MemoryAccount
    rows_at_once: int = 0
    seconds: float = float("inf")
    tokens_per_second: float = 0.0
    missing_bytes: int = 0

    @property
    def fits(self) -> bool:
        return not self.missing_bytes

    @property
    def why_out(self) -> str:
        if self.fits:
            return ""
        return f"needs {format_bytes(self.missing_bytes)} more"


@dataclass(frozen=True)
class Choice:
    """All candidates, the fastest first; ``best`` is None when none fits."""

    candidates: tuple[Candidate, ...]
    best: Candidate | None
    reason: str

    def pareto(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in both finish time and KV tokens of a replica."""
        kept: list[Candidate] = []
        for candidate in self.candidates:
            if not candidate.fits:
                continue
            tokens = candidate.account.num_kv_tokens
            if all(tokens > other.account.num_kv_tokens for other in kept):
                kept.append(candidate)
        return tuple(kept)


def enumerate_layouts(
    model: ModelFacts, cluster: Cluster, num_slots: int | None = None
) -> Iterator[Layout]:
    """Layouts that use every device: t x d x groups, pools within the nearest links.

    Tensor parallelism takes powers of two that divide the heads; a streamed pool 2 or d-1 slots
    unless it is told, as one slot hides nothing.
    """
    width = 1
    while width <= cluster.node_devices:
        if cluster.num_devices % width == 0 and model.num_heads % width == 0:
            replicas = cluster.num_devices // width
            yield Layout(width, 1, replicas, "none")
            for ranks in range(2, cluster.node_devices // width + 1):
                if replicas % ranks == 0 and ranks <= model.num_layers:
                    yield from _pools(width, ranks, replicas // ranks, cluster, num_slots)
        width *= 2


def _pools(
    width: int, ranks: int, groups: int, cluster: Cluster, num_slots: int | None
) -> Iterator[Layout]:
    if cluster.device.maps_peers:
        yield Layout(width, ranks, groups, "mapped")
    for slots in [num_slots] if num_slots else sorted({2, max(2, ranks - 1)}):
        yield Layout(width, ranks, groups, "streamed", slots)
        yield Layout(width, ranks, groups, "streamed", slots, ships=True)


def choose(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    engine: EngineLimits,
    layouts: Sequence[Layout] | None = None,
) -> Choice:
    """Time every layout on the workload. Under 2 s for 8 devices.

    Raises MemoryPlanError when there is no layout to look at.
    """
    asked = list(enumerate_layouts(model, cluster) if layouts is None else layouts)
    if not asked:
        raise MemoryPlanError("no layout is left to choose from: allow more of them")
    candidates = [evaluate(model, cluster, workload, engine, x, _COARSE) for x in asked]
    candidates.sort(key=_by_time)
    for index, candidate in enumerate(candidates[:_NUM_FINE]):
        candidates[index] = evaluate(model, cluster, workload, engine, candidate.layout)
    candidates.sort(key=_by_time)
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return Choice(tuple(candidates), None, "no layout fits")
    near = [c for c in fitting if c.seconds <= fitting[0].seconds * (1 + _TIE)]
    best = max(near, key=lambda c: (c.account.num_kv_tokens, -c.seconds, -c.layout.num_ranks))
    return Choice(tuple(candidates), best, _reason(best, fitting))


def evaluate(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    engine: EngineLimits,
    layout: Layout,
    depth: int = _FINE,
) -> Candidate:
    """One layout on one job; ``depth`` as for ``job_seconds``."""
    account = account_layout(model, layout, cluster.device.usable_bytes, engine)
    limits = replica_limits(account, engine)
    longest = limits.row_tokens(workload.longest_row)
    if longest > limits.num_kv_tokens:
        needed = (longest + account.block_tokens) * account.kv_bytes_per_token
        return Candidate(layout, account, missing_bytes=needed - account.kv_bytes)
    seconds = job_seconds(model, cluster, workload, layout, limits, depth)
    rate = workload.num_output_tokens / seconds
    return Candidate(layout, account, limits.rows_at_once(workload), seconds, rate)


def job_seconds(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    limits: ReplicaLimits,
    depth: int = _FINE,
) -> float:
    """Predicted seconds of a job. All rows of a short one are simulated.

    Of a long one two samples are, on one group of replicas, one twice as large as the other: what
    the larger adds is the pace of the rest. The larger fills the replicas ``depth`` times.
    """
    times, policy = pool_times(model, cluster, layout), policy_of(layout)

    def seconds(rows: Workload, replicas: int) -> float:
        return simulate_job(times, limits, rows, replicas, policy).seconds

    sample = max(SAMPLE_ROWS_PER_REPLICA, depth * limits.rows_at_once(workload))
    is_short = workload.num_rows <= sample * layout.num_replicas
    if is_short and layout.num_replicas <= _MOST_REPLICAS:
        return seconds(workload, layout.num_replicas)
    of_group = workload.every(layout.num_groups)
    step = -(-of_group.num_rows // (sample * layout.num_ranks))
    if step == 1:
        return seconds(of_group, layout.num_ranks)
    whole, half = of_group.every(step), of_group.every(2 * step)
    of_whole = seconds(whole, layout.num_ranks)
    pace = (of_whole - seconds(half, layout.num_ranks)) / (whole.num_rows - half.num_rows)
    return of_whole + pace * (of_group.num_rows - whole.num_rows)


def account_layout(
    model: ModelFacts, layout: Layout, memory_bytes: int, engine: EngineLimits
) -> MemoryAccount:
    """The account of one device, by the function that ``run`` uses."""
    return account_memory(
        model,
        layout_shares(model, layout),
        memory_bytes,
        engine.max_num_batched_tokens,
        engine.max_num_seqs,
        layout.tensor_parallel,
        engine.activation_bytes,
    )


def layout_shares(
    model: ModelFacts,
    layout: Layout,
    order: FetchOrder = "peak-shift",
    ship_below_rows: int = 0,
) -> tuple[PoolShare, ...]:
    """The shares of one group's replicas; the last argument is for layouts that ship."""
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
    """B_th for layouts that ship, 0 for others: what ``PoolShare.ship_below_rows`` is made for."""
    if not layout.ships or layout.num_ranks == 1:
        return 0
    times = pool_times(model, cluster, layout)
    return times.threshold_batch(context_tokens) or SHIP_ROWS


def engine_limits(options: EngineOptions) -> EngineLimits:
    return EngineLimits(options.max_num_seqs, options.max_num_batched_tokens)


def replica_limits(account: MemoryAccount, engine: EngineLimits) -> ReplicaLimits:
    """What a replica may hold; the engine keeps one block for itself."""
    return ReplicaLimits(
        num_kv_tokens=max(0, account.num_kv_tokens - account.block_tokens),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_tokens=account.block_tokens,
    )


def policy_of(layout: Layout) -> Policy:
    if layout.pool == "streamed":
        return "per-replica" if layout.ships else "stream"
    return "map" if layout.pool == "mapped" else "local"


def pool_times(model: ModelFacts, cluster: Cluster, layout: Layout) -> PoolTimes:
    cost = CostModel(model, cluster, layout.tensor_parallel)
    return PoolTimes(cost, layout.num_ranks, layout.num_slots)


def _by_time(candidate: Candidate) -> tuple[float, int, str]:
    return candidate.seconds, -candidate.account.num_kv_tokens, str(candidate.layout)


def _reason(best: Candidate, fitting: Sequence[Candidate]) -> str:
    """Why it is the best: what the next best of another kind would take."""
    kind = (best.layout.tensor_parallel, best.layout.pool)
    others = [c for c in fitting if (c.layout.tensor_parallel, c.layout.pool) != kind]
    if not others:
        return "the only kind of layout that fits"
    other = min(others, key=lambda c: c.seconds)
    ratio = other.seconds / best.seconds
    tokens = best.account.num_kv_tokens / max(1, other.account.num_kv_tokens)
    if ratio > 1 + _TIE:
        return f"{ratio:.2f}x as fast as {other.layout}, with {tokens:.2f}x its KV tokens"
    return f"as fast as {other.layout}, with {tokens:.2f}x its KV tokens"
