"""Predicted time of a running plan: its 1F1B schedule simulated, beside the planner's formula.

The formula takes the slowest of all stages and transfers, as if the others always hid behind it.
The simulator lets minibatches wait for each other, for transfers in their loop and for replicas.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.action_cost import plan_costs
from elbowroom.planning.pipeline.plan import plan_data_parallel, plan_on_levels
from elbowroom.planning.pipeline.schedule import plan_schedule
from elbowroom.planning.pipeline.timeline import PipelineTimeline, simulate_pipeline
from elbowroom.plans.pipeline import PipelinePlan

_FILLS, _LEAST_FILLS = 6, 3
"""Minibatches that are simulated, as a multiple of those that fill the pipe: wanted, least.

On the PipeDream authors' profiles 6 come within 0.3 % of what 24 give, 3 within 4 %.
"""

_MOST_WORK = 2_000_000
"""Limit of a simulation, actions x (workers + ``_OVERHEAD``): about a second."""

_OVERHEAD = 20
_GAIN = 0.01
"""Relative time that a plan must save to be taken instead of one listed before it."""

DEPTHS = (1, 2)


class PipelinePrediction(NamedTuple):
    """Pace of a full pipe, and the whole simulated run.

    ``seconds`` are per minibatch; ``idle`` is the fraction of them in which each worker of a stage
    computes nothing.
    """

    seconds: float
    idle: tuple[float, ...]
    timeline: PipelineTimeline


def predict(plan: PipelinePlan, graph: LayerGraph) -> PipelinePrediction | None:
    """Simulate enough minibatches that the pipe is full for a while.

    Returns None if that would take much longer than a second: long pipes of many stages. Raises
    InputError for a graph that lacks layers of the plan.
    """
    first = plan.stages[0]
    fill = first.in_flight * first.replicas
    actions = 8 * len(plan.stages)
    most_fills = _MOST_WORK // (actions * (plan.num_workers + _OVERHEAD) * fill)
    if most_fills < _LEAST_FILLS:
        return None
    replicas = plan.replicas
    num_minibatches = fill * min(most_fills, _FILLS)
    schedule = plan_schedule(replicas, num_minibatches, depth=plan.options.depth)
    costs = plan_costs(plan, graph)
    timeline = simulate_pipeline(schedule, costs)
    seconds = timeline.steady_seconds
    computed = (
        (stage.forward_seconds + stage.backward_seconds + stage.update_seconds) / count
        for stage, count in zip(costs.stages, replicas, strict=True)
    )
    idle = tuple(1 - own / seconds if seconds else 0.0 for own in computed)
    return PipelinePrediction(seconds, idle, timeline)


def with_prediction(plan: PipelinePlan, prediction: PipelinePrediction | None) -> PipelinePlan:
    """The plan with its simulated seconds filled in, or None where it was not simulated."""
    return replace(plan, simulated_seconds=prediction.seconds if prediction else None)


def alternatives(plan: PipelinePlan, graph: LayerGraph) -> tuple[PipelinePlan, ...]:
    """Other plans for the same workers: best by formula, straight, data parallel.

    Each at depth 1 and 2; those that fit in the memory of a worker, each once, the given plan
    first.
    """
    found = [plan]
    for depth in DEPTHS:
        options = replace(plan.options, depth=depth)
        for planner, own in (
            (plan_on_levels, options),
            (plan_on_levels, replace(options, straight=True)),
            (plan_data_parallel, options),
        ):
            try:
                other = planner(graph, plan.levels, own)
            except (InputError, MemoryPlanError):
                continue
            if not any(_is_same(other, known) for known in found):
                found.append(other)
    return tuple(found)


def fastest(plans: tuple[PipelinePlan, ...]) -> PipelinePlan:
    """The plan with the least simulated seconds; the first of those that are all but equal.

    Plans that were not simulated only count if none was.
    """
    best = plans[0]
    for plan in plans[1:]:
        if plan.simulated_seconds is None:
            continue
        least = best.simulated_seconds
        if least is None or plan.simulated_seconds < least * (1 - _GAIN):
            best = plan
    return best


def _is_same(one: PipelinePlan, other: PipelinePlan) -> bool:
    """Whether two plans run alike: depth means nothing where no stage has another behind it."""
    depths = {plan.options.depth for plan in (one, other)}
    return one.stages == other.stages and (len(depths) == 1 or len(one.stages) == 1)
