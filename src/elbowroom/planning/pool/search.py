"""Search over layouts: times each on the job, and says which to take and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload
from elbowroom.planning.pool.job import ReplicaLimits, simulate_job
from elbowroom.planning.pool.layouts import (
    USUAL_TOKENS,
    EngineLimits,
    enumerate_layouts,
    layout_budget,
    policy_of,
    pool_times,
    replica_limits,
)
from elbowroom.planning.pool.memory import logits_bytes
from elbowroom.plans.pool import Layout, MemoryBudget

SAMPLE_ROWS_PER_REPLICA = 300
"""Least rows per replica in the sample of a long job. ``simulate`` runs every row."""

_COARSE, _FINE = 2, 8
_NUM_FINE, _MOST_REPLICAS = 2, 16
"""Times that a sample fills the replicas: for all layouts, then for the best of them.

With more replicas than ``_MOST_REPLICAS``, one group stands for all, in a short job too.
"""


MOST_ROWS, LEAST_TOKENS = 1024, 256
"""Most rows at once and least tokens of one iteration that are chosen.

The first is vLLM's own for its largest devices; few tokens take prompts in small chunks.
"""

TIE = 0.01
"""Relative difference of finish times that counts as equal: most KV tokens then decide."""


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory budget and predicted job, or the bytes a device lacks for it.

    ``engine`` leaves nothing open. ``cluster`` is what the layout runs on.
    """

    layout: Layout
    budget: MemoryBudget
    engine: EngineLimits
    cluster: Cluster
    rows_at_once: int = 0
    seconds: float = float("inf")
    tokens_per_second: float = 0.0
    missing_bytes: int = 0

    @property
    def fits(self) -> bool:
        return not self.missing_bytes

    def describe(self) -> str:
        """Description for people: the number of engines, devices of each, and what they share."""
        layout, device = self.layout, self.cluster.device.name
        devices = layout.tensor_parallel * layout.pipeline_parallel
        if devices > 1:
            device = f"{devices} devices ({device})"
        replicas = f"{layout.num_replicas} replicas, each"
        if layout.num_replicas == 1:
            replicas = "1 replica"
        pool = "no pool" if layout.pool == "none" else f"{layout.pool} pool"
        pool = "experts divided" if layout.expert_parallel else pool
        return f"{replicas} on {device}, {pool}"

    @property
    def why_out(self) -> str:
        if self.fits:
            return ""
        return f"lacks {format_bytes(self.missing_bytes)}"


@dataclass(frozen=True)
class Choice:
    """Result of a search: candidates, the fastest first; ``best`` is None when none fits."""

    candidates: tuple[Candidate, ...]
    best: Candidate | None
    reason: str

    @property
    def next_best(self) -> Candidate | None:
        """The fastest fitting candidate of another kind than the best; None if there is none."""
        return _next_best(self.best, self.candidates) if self.best else None

    def pareto(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in both finish time and KV tokens of a replica."""
        kept: list[Candidate] = []
        for candidate in self.candidates:
            if not candidate.fits:
                continue
            tokens = candidate.budget.num_kv_tokens
            if all(tokens > other.budget.num_kv_tokens for other in kept):
                kept.append(candidate)
        return tuple(kept)


def choose(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    engine: EngineLimits,
    layouts: Sequence[Layout] | None = None,
) -> Choice:
    """Time every layout on the workload and choose one. Takes under 2 s for 8 devices.

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
    near = [c for c in fitting if c.seconds <= fitting[0].seconds * (1 + TIE)]
    best = max(near, key=lambda c: (c.budget.num_kv_tokens, -c.seconds, -c.layout.num_ranks))
    return Choice(tuple(candidates), best, _reason(best, fitting))


def first_that_fits(choices: Sequence[Choice]) -> Choice:
    """The first choice that has a best, with the candidates of all choices.

    Its reason compares with the next best of them all. Raises IndexError without any choice.
    """
    candidates = sorted((c for choice in choices for c in choice.candidates), key=_by_time)
    best = next((choice.best for choice in choices if choice.best is not None), None)
    if best is None:
        return Choice(tuple(candidates), None, choices[0].reason)
    fitting = [candidate for candidate in candidates if candidate.fits]
    return Choice(tuple(candidates), best, _reason(best, fitting))


def evaluate(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    engine: EngineLimits,
    layout: Layout,
    depth: int = _FINE,
) -> Candidate:
    """Evaluate one layout on one job; ``depth`` as for ``job_seconds``."""
    memory = cluster.device.usable_bytes
    engine = fill_in(model, layout, memory, engine, workload)
    candidate = Candidate(layout, layout_budget(model, layout, memory, engine), engine, cluster)
    missing = _missing_bytes(candidate.budget, engine, workload)
    if missing > 0:
        return replace(candidate, missing_bytes=missing)
    limits = replica_limits(candidate.budget, engine)
    seconds = job_seconds(model, cluster, workload, layout, limits, depth)
    return replace(
        candidate,
        rows_at_once=limits.rows_at_once(workload),
        seconds=seconds,
        tokens_per_second=workload.num_rated_tokens / seconds,
    )


def fill_in(
    model: ModelFacts,
    layout: Layout,
    memory_bytes: int,
    engine: EngineLimits,
    workload: Workload,
) -> EngineLimits:
    """Fill in what ``engine`` leaves open, for a job.

    Rows at once are those that a replica's cache holds at their mean length, but no more than it
    has to answer; tokens of one iteration are 2,048. Where the longest row would not fit, fewer
    tokens are taken, and then fewer rows. Never more rows than tokens, which vLLM refuses.
    """
    tokens = engine.max_num_batched_tokens or USUAL_TOKENS
    rows: int | None = None
    while True:
        tried = replace(engine, max_num_batched_tokens=tokens)
        if rows is None:
            fitting = _rows_that_fit(model, layout, memory_bytes, tried, workload)
            rows = engine.max_num_seqs or min(fitting, engine.max_num_batched_tokens or fitting)
        if engine.max_num_batched_tokens is None:
            tried = replace(tried, max_num_batched_tokens=max(tokens, rows))
        tried = replace(tried, max_num_seqs=rows)
        budget = layout_budget(model, layout, memory_bytes, tried)
        if not _missing_bytes(budget, tried, workload):
            return tried
        if engine.max_num_batched_tokens is None and tokens > LEAST_TOKENS:
            tokens, rows = tokens // 2, None
        elif engine.max_num_seqs is None and rows > 1:
            rows //= 2
        else:
            return tried


def _rows_that_fit(
    model: ModelFacts,
    layout: Layout,
    memory_bytes: int,
    engine: EngineLimits,
    workload: Workload,
) -> int:
    """Rows that fit at once; each takes its KV cache to its end, and room for its logits.

    At most the rows that a replica has to answer, and ``MOST_ROWS``; at least 1.
    """
    budget = layout_budget(model, layout, memory_bytes, replace(engine, max_num_seqs=1))
    row_tokens = replica_limits(budget, engine).row_tokens(workload.mean_row)
    each = row_tokens * budget.kv_bytes_per_token
    if engine.activation_bytes is None:
        each += logits_bytes(model, 1)
    room = budget.kv_bytes - budget.block_tokens * budget.kv_bytes_per_token
    to_answer = -(-workload.num_rows // layout.num_replicas)
    return max(1, min(room // each, to_answer, MOST_ROWS))


def _missing_bytes(budget: MemoryBudget, engine: EngineLimits, workload: Workload) -> int:
    """Bytes that a device lacks for the job's longest row and for ``max_model_len``; 0 if none."""
    limits = replica_limits(budget, engine)
    longest = limits.row_tokens(max(workload.longest_row, engine.max_model_len or 1))
    if longest <= limits.num_kv_tokens:
        return 0
    return (longest + budget.block_tokens) * budget.kv_bytes_per_token - budget.kv_bytes


def without_idle_cache(model: ModelFacts, candidate: Candidate, workload: Workload) -> MemoryBudget:
    """The memory budget without KV cache that this job cannot fill, to leave memory to others.

    There is room for all rows of the job at once, and for one of the longest that the model takes.
    If rows may be longer than was planned, the whole cache is kept.
    """
    budget = candidate.budget
    if not workload.is_bounded:
        return budget
    block = budget.block_tokens
    of_all = int((-(-(workload.prompt_tokens + workload.output_tokens) // block)).sum())
    longest = max(model.max_model_len, candidate.engine.max_model_len or 0)
    blocks = max(-(-of_all // candidate.layout.num_replicas), -(-longest // block)) + 2
    needed = blocks * block * budget.kv_bytes_per_token
    idle = max(0, budget.kv_bytes - needed)
    return replace(budget, memory_bytes=budget.memory_bytes - idle, kv_bytes=budget.kv_bytes - idle)


def job_seconds(
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    limits: ReplicaLimits,
    depth: int = _FINE,
) -> float:
    """Predicted seconds of a job, by simulating all rows of a short one.

    For a long job, two samples are simulated on one group of replicas, one twice as large as the
    other: what the larger adds gives the pace of the rest. The larger fills the replicas ``depth``
    times.
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


def _by_time(candidate: Candidate) -> tuple[float, int, str]:
    return candidate.seconds, -candidate.budget.num_kv_tokens, str(candidate.layout)


def _next_best(best: Candidate, candidates: Sequence[Candidate]) -> Candidate | None:
    def kind(candidate: Candidate) -> tuple[int, int, str]:
        layout = candidate.layout
        return layout.tensor_parallel, candidate.cluster.num_devices, layout.pool

    others = [c for c in candidates if c.fits and kind(c) != kind(best)]
    return min(others, key=lambda c: c.seconds, default=None)


def _reason(best: Candidate, fitting: Sequence[Candidate]) -> str:
    """Reason why the best is best, compared with the next best of another kind."""
    other = _next_best(best, fitting)
    if other is None:
        return "the only kind of layout that fits"
    ratio = other.seconds / best.seconds
    tokens = best.budget.num_kv_tokens / max(1, other.budget.num_kv_tokens)
    if ratio < 1 - TIE:
        return f"one engine on all cores; {other.layout} might take {ratio:.2f}x as long"
    if ratio > 1 + TIE:
        return f"{ratio:.2f}x as fast as {other.layout}, with {tokens:.2f}x its KV tokens"
    return f"as fast as {other.layout}, with {tokens:.2f}x its KV tokens"
