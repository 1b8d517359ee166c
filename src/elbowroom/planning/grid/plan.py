"""Grid plans: from the shapes of a model to a grid for each of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.layer_shapes import ModelShapes
from elbowroom.core.units import format_bytes
from elbowroom.planning.grid.blocks import Block
from elbowroom.planning.grid.choice import candidates_of, choose
from elbowroom.planning.grid.explain import GridPricing, followed
from elbowroom.planning.grid.explanation import GridExplanation, GridTerms
from elbowroom.planning.grid.problem import Choices, GridProblem
from elbowroom.planning.grid.settings import Forms, GridLink, GridSettings
from elbowroom.planning.grid.strategies import all_strategies
from elbowroom.plans.grid import GridPlan, GridPrediction, LayerGrid
from elbowroom.plans.grid_layout import Sent
from elbowroom.plans.grid_traffic import LayerTraffic, traffic

_MOST_COUNTED = 64
"""Workers of whom each message is counted, which takes time that grows with their square."""

_LATENCY_ONLY = GridLink(1.0, float("inf"))
_BYTES_ONLY = GridLink(0.0, 1.0)


class PlannedGrid(NamedTuple):
    """A plan, and why it is what it is."""

    plan: GridPlan
    explanation: GridExplanation


def plan_grid(
    shapes: ModelShapes,
    procs: int,
    batch: int,
    link: GridLink,
    *,
    forms: Forms = "all",
    flops_per_second: float | None = None,
    memory_bytes: int | None = None,
    overlap: bool = True,
) -> PlannedGrid:
    """The best grid for each layer of a model, and what each costs.

    Arguments are those of ``GridSettings``; ``shapes`` may be of another batch. Raises InputError
    for numbers that make no sense, a model without weights, and where the paper's forms have no
    plan; MemoryPlanError, with the smallest that was found, where none fits in ``memory_bytes``.
    """
    settings = GridSettings(procs, batch, link, forms, flops_per_second, memory_bytes, overlap)
    shapes = shapes.for_batch(batch)
    if not shapes.weighted:
        raise InputError("the model has no layer with weights that can be split: nothing to plan")
    pricing = GridPricing(shapes, settings)
    if forms == "paper":
        grids, is_exact = _paper_grids(pricing), False
    else:
        problem = _problem(pricing, forms)
        best = choose(problem, _restricted(pricing, problem))
        grids = problem.grids(best.choices)
        is_exact = best.is_exact and all(ways.is_complete for ways in problem.ways)
    explanation = pricing.explain(grids, is_exact)
    return PlannedGrid(_plan(pricing, grids, explanation), explanation)


def explain_grid(shapes: ModelShapes, plan: GridPlan, settings: GridSettings) -> GridExplanation:
    """What a plan costs, also one that was written by hand.

    ``settings`` give the link, the rate and the overlap. Raises InputError for a plan without a
    grid for a layer that has weights, and for one that moves layers which lie as others do.
    """
    used = replace(settings, procs=plan.procs, batch=plan.batch)
    pricing = GridPricing(shapes.for_batch(plan.batch), used)
    known = {block.name for block in pricing.graph.blocks}
    if unknown := [name for name in plan.grid_of if name not in known]:
        raise InputError(
            f"layer '{unknown[0]}' has no weights and joins nothing: what a grid of its own costs "
            f"is not known"
        )
    return pricing.explain(pricing.grids(plan.grid_of))


def _problem(pricing: GridPricing, forms: Forms) -> GridProblem:
    settings, graph = pricing.settings, pricing.graph
    ways = all_strategies(graph, settings.procs, settings.batch, forms)
    return GridProblem(pricing.shapes, settings, ways, graph)


def _restricted(pricing: GridPricing, problem: GridProblem) -> Iterator[Choices]:
    """Choices of plans in simpler forms: a price on sums of weights alone misses some of them."""
    plans = (pricing.paper.batch(), pricing.paper.best())
    simpler = [pricing.grids(plan.by_name) for plan in plans if plan is not None]
    if pricing.settings.forms == "all":
        linear = _problem(pricing, "linear")
        simpler += [linear.grids(each.choices) for each in candidates_of(linear)]
    for grids in simpler:
        choices = problem.choices_of(grids)
        if choices is not None:
            yield choices


def _paper_grids(pricing: GridPricing) -> tuple[LayerGrid, ...]:
    settings = pricing.settings
    plan = pricing.paper.best()
    if plan is None:
        raise InputError(
            f"{settings.procs} workers and a batch of {settings.batch} do not go round in the "
            f"paper's forms: some layer has too few rows, or features; give the forms linear or all"
        )
    grids = pricing.grids(plan.by_name)
    total = sum(pricing.terms(grids), start=GridTerms())
    limit = settings.memory_bytes
    if limit is not None and total.memory_bytes > limit:
        raise MemoryPlanError(
            f"the paper's best form needs {format_bytes(round(total.memory_bytes))} a worker, and "
            f"the limit is {format_bytes(limit)}: give the forms linear or all, or more workers"
        )
    return grids


def _plan(
    pricing: GridPricing, grids: Sequence[LayerGrid], explanation: GridExplanation
) -> GridPlan:
    """The plan, which names no join or fork that lies as what it reads first does."""
    settings, graph = pricing.settings, pricing.graph
    named = []
    for index, (block, grid) in enumerate(zip(graph.blocks, grids, strict=True)):
        source = graph.main_source(index)
        if block.kind == "weighted" or (
            block.kind == "plain" and (source is None or _differs(grids[source], grid, block))
        ):
            named.append(grid)
    plan = GridPlan(settings.procs, settings.batch, tuple(named))
    sent, total = _sent(pricing, grids, plan), explanation.total
    prediction = GridPrediction(
        seconds=explanation.seconds,
        compute_seconds=total.compute,
        communication_seconds=total.communication,
        hidden_seconds=explanation.hidden_seconds,
        messages=sent.messages,
        num_bytes=sent.elements * pricing.shapes.element_bytes,
        memory_bytes=round(total.memory_bytes),
    )
    return replace(plan, prediction=prediction)


def _differs(source: LayerGrid, grid: LayerGrid, block: Block) -> bool:
    return source.inputs > 1 or followed(source, block) != grid


def _sent(pricing: GridPricing, grids: Sequence[LayerGrid], plan: GridPlan) -> Sent:
    """What all workers send in an iteration: counted, or of many workers by the closed forms."""
    if plan.procs > _MOST_COUNTED:
        num_bytes = _by_form(pricing, grids, _BYTES_ONLY)
        messages = _by_form(pricing, grids, _LATENCY_ONLY)
        return Sent(round(messages), round(num_bytes / pricing.shapes.element_bytes))
    total = LayerTraffic()
    for of_layer in traffic(pricing.shapes, plan).values():
        total = total.plus(of_layer)
    return total.forward.plus(total.backward).plus(total.update)


def _by_form(pricing: GridPricing, grids: Sequence[LayerGrid], link: GridLink) -> float:
    """What all workers send, as the closed forms count it: all communication is linear in both."""
    one = GridPricing(pricing.shapes, replace(pricing.settings, link=link), pricing.graph)
    total = sum(one.terms(grids), start=GridTerms())
    return total.communication * pricing.settings.procs
