"""The pool of the layout that is taken, and why: one line for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload
from elbowroom.planning.pool.layouts import EngineLimits, why_not_run
from elbowroom.planning.pool.search import TIE, Candidate, evaluate
from elbowroom.plans.pool import Layout, PoolMode


def describe_pool(
    model: ModelFacts,
    workload: Workload,
    best: Candidate,
    candidates: Sequence[Candidate],
    asked: PoolMode | None,
    engine: EngineLimits,
) -> str:
    """The mode and why it is taken here, such as "pool mapped: 1.90x the KV cache of full copies".

    ``candidates`` are what ``best`` was chosen from, where ``asked`` and ``engine`` left a choice.
    """
    mode = best.layout.pool
    if mode == "none":
        return f"pool none: {_why_none(model, best, candidates, asked)}"
    copies = replace(best.layout, pool="none", num_ranks=1, num_groups=best.layout.num_replicas)
    copies = replace(copies, num_slots=0)
    found = [candidate for candidate in candidates if candidate.layout == copies]
    beside = found[0] if found else evaluate(model, best.cluster, workload, engine, copies)
    if not beside.fits:
        return f"pool {mode}: full copies lack {format_bytes(beside.missing_bytes)}"
    ratio = best.budget.num_kv_tokens / beside.budget.num_kv_tokens
    return f"pool {mode}: {ratio:.2f}x the KV cache of full copies"


def _why_none(
    model: ModelFacts, best: Candidate, candidates: Sequence[Candidate], asked: PoolMode | None
) -> str:
    layout = best.layout
    if asked == "none":
        return "as asked for"
    if model.cannot_pool_here:
        return model.cannot_pool_here
    if layout.num_replicas == 1:
        return "one replica shares with nobody: --replicas 2 or more might pool"
    mapped = Layout(layout.tensor_parallel, layout.num_replicas, 1, "mapped")
    if why := why_not_run(model, best.cluster, mapped):
        return why
    pools = [
        candidate
        for candidate in candidates
        if candidate.fits
        and candidate.layout.pool != "none"
        and candidate.layout.num_replicas == layout.num_replicas
    ]
    if not pools:
        return "none of its modes fits"
    other = min(pools, key=lambda candidate: candidate.seconds)
    ratio = other.seconds / best.seconds
    if ratio > 1 + TIE:
        return f"a {other.layout.pool} one is predicted to take {ratio:.2f}x as long"
    return f"a {other.layout.pool} one frees no memory for KV cache"
