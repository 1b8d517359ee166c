"""Replays a plan: its whole job row by row, and a few iterations of its pool layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from elbowroom.app.architecture import built_tensors
from elbowroom.app.machine import (
    THIS_MACHINE,
    device_cores,
    find_cluster,
    find_engine_cluster,
)
from elbowroom.app.plan import read_workload
from elbowroom.core.cluster_file import is_preset
from elbowroom.core.errors import InputError
from elbowroom.core.model import ModelFacts, read_model
from elbowroom.core.trace import Count, Span
from elbowroom.core.workload import Workload, workload
from elbowroom.jobs.limits import RowLimits
from elbowroom.planning.cost import Batch, CostModel
from elbowroom.planning.pool.job import JobOutcome, simulate_job
from elbowroom.planning.pool.layouts import (
    engine_limits,
    layout_shares,
    policy_of,
    pool_times,
    replica_limits,
    ship_threshold,
)
from elbowroom.planning.pool.timeline import PoolTimeline, iteration_actions, simulate_pool
from elbowroom.plans.pool import Layout, PoolShare, RunPlan

_TRACE_ITERATIONS = 3


@dataclass(frozen=True)
class SimulationSettings:
    """What ``elbowroom simulate`` is told. Without a job, the plan's own mean row is repeated.

    Without a cluster, the one that the plan was made for is taken, if its name says which.
    """

    plan: RunPlan
    cluster: str | None = None
    inputs: Sequence[Path] | None = None
    lengths: str | None = None
    limits: RowLimits = field(default_factory=RowLimits)


@dataclass(frozen=True)
class Iterations:
    """Some iterations of one group, all replicas with the same batch."""

    batch: Batch
    ships: bool
    pool: PoolTimeline

    def __str__(self) -> str:
        shipped = ", shipped" if self.ships else ""
        return f"iteration, batch {self.batch.decode_rows:.0f}{shipped}"


@dataclass(frozen=True)
class Simulated:
    """A job as it would go, and iterations of one group.

    At its usual batch, and where that streams and smaller ones ship, of one row each.
    """

    layout: Layout
    job: JobOutcome
    iterations: tuple[Iterations, ...]

    def trace(self) -> Iterator[Span | Count]:
        """The job on processes ``replica r``, iterations on ``iteration ..., replica r``."""
        for segment in self.job.segments:
            process = f"replica {segment.replica}"
            name = f"{segment.mode} {segment.num_rows} rows"
            details = {
                "iterations": segment.num_iterations,
                "rows": segment.num_rows,
                "prefill_tokens": segment.prefill_tokens,
            }
            yield Span(process, "iterations", name, segment.start, segment.end, details)
            yield Count(process, "rows", segment.start, segment.num_rows)
        for iterations in self.iterations:
            yield from iterations.pool.spans(str(iterations))


def simulate_plan(settings: SimulationSettings) -> Simulated:
    """Raises InputError for a job that cannot be read, MemoryPlanError for rows too long."""
    plan, layout = settings.plan, settings.plan.layout
    assert layout is not None
    model = _model(plan)
    name = settings.cluster or _planned_for(plan)
    find = find_engine_cluster if name == THIS_MACHINE else find_cluster
    cluster = find(name, device_cores(plan), plan.engine.dtype)
    limits = replica_limits(plan.budget, engine_limits(plan.engine))
    rows = _workload(settings).longest_first()
    times = pool_times(model, cluster, layout)
    job = simulate_job(times, limits, rows, layout.num_replicas, policy_of(layout))
    at_once = limits.rows_at_once(rows)
    batch, last = (Batch(n, n * rows.mean_context) for n in (at_once, 1))
    ship_below = ship_threshold(model, cluster, layout, rows.mean_context)
    ships = at_once < ship_below
    if plan.shares[0].owners:
        shares = plan.shares[: layout.num_ranks]
    else:
        shares = layout_shares(model, layout, ship_below_rows=ship_below)
    iterations = [_iterate(times.cost, shares, batch, ships)]
    if ship_below > 1 and not ships:
        iterations.append(_iterate(times.cost, shares, last, True))
    return Simulated(layout, job, tuple(iterations))


def _iterate(cost: CostModel, shares: Sequence[PoolShare], batch: Batch, ships: bool) -> Iterations:
    layers = frozenset(range(len(shares[0].owners))) if ships else frozenset[int]()
    actions = [iteration_actions(share, layers) for share in shares]
    pool = simulate_pool(cost, shares, [batch] * len(shares), actions, _TRACE_ITERATIONS)
    return Iterations(batch, ships, pool)


def _model(plan: RunPlan) -> ModelFacts:
    facts = read_model(Path(plan.model_dir), plan.engine.dtype, build=built_tensors)
    return replace(facts, kv_dtype=plan.engine.kv_dtype)


def _planned_for(plan: RunPlan) -> str:
    name = plan.prediction.cluster if plan.prediction else THIS_MACHINE
    if name == THIS_MACHINE or is_preset(name):
        return name
    raise InputError(f"the plan was made for a cluster '{name}' of a file: give it as --cluster")


def _workload(settings: SimulationSettings) -> Workload:
    model, predicted = Path(settings.plan.model_dir), settings.plan.prediction
    if settings.lengths is not None or settings.inputs is not None:
        return read_workload(settings.lengths, settings.inputs, model, settings.limits)[0]
    if predicted is None:
        raise InputError("the plan was made for no job: give --input or --lengths")
    rows = predicted.num_rows
    counted = workload(
        [round(predicted.prompt_tokens / rows)] * rows,
        [round(predicted.output_tokens / rows)] * rows,
    )
    return replace(counted, generates=predicted.output_tokens > 0)
