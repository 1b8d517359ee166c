"""Costs of pipeline actions: seconds and bytes of stages, and the links between workers.

There are two models of links. With ``worker`` each worker, and each unit of a level above the
lowest, sends and receives at once at the full bandwidth, as a network card does; everything that it
sends shares its way out. With ``cut`` all activations and gradients between two stages share one
link in each unit that holds both, as the planner assumes (2 a / B, arXiv 1806.03377); weights have
links of their own.

Replicas synchronise their weights in the seconds of ``planning.pipeline.stage_cost``, level by
level. With overlap ``max`` the synchronisation starts together with the last backward before it,
because gradients become ready layer by layer; with ``sum`` it starts when that backward has ended.
The planner's formula for ``max`` hides it behind the forward of the round too.

Workers that swap each have a link of their own for it, with one queue. Copies out run beside the
forward that makes what they copy, and the worker's next forward waits for them. Copies in are asked
for when the backward begins, which ends no earlier than they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.segments import find_inputs
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan

LinkModel = Literal["worker", "cut"]
LINK_MODELS: tuple[LinkModel, ...] = get_args(LinkModel)


@dataclass(frozen=True)
class StageCosts:
    """Costs of one minibatch on one worker of a stage.

    ``kept_bytes`` is what a minibatch keeps between forward and backward, ``crossing_bytes`` the
    activations over the cut behind the stage, and ``returned_bytes`` the gradients that come back
    over it (None: the same number). ``fixed_bytes`` is memory that does not scale with minibatches
    in flight. A minibatch swaps ``swapped_bytes`` of what it keeps: out beside its forward, and in
    beside its backward.
    """

    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int = 0
    kept_bytes: int = 0
    crossing_bytes: int = 0
    update_seconds: float = 0.0
    returned_bytes: int | None = None
    fixed_bytes: int = 0
    swapped_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        """Gradients that come back over the cut behind the stage, per minibatch."""
        return self.crossing_bytes if self.returned_bytes is None else self.returned_bytes


@dataclass(frozen=True)
class PipelineCosts:
    """Costs of stages, and the ``levels`` of links that join them, the lowest first.

    ``level_replicas`` has each stage's replicas at each level, the outermost level first; it may be
    left out if there is one level. Of ``options``, only ``sync``, ``overlap`` and
    ``swap_bandwidth`` count, and whether ``optimizer`` is None. Without ``overlap_compute``,
    transfers take the compute of both ends as well, swapping that of its worker. Raises InputError
    for an unknown model of links, and for stages that swap without a bandwidth.
    """

    stages: tuple[StageCosts, ...]
    levels: tuple[Level, ...]
    level_replicas: tuple[tuple[int, ...], ...] = ()
    options: PipelineOptions = field(default_factory=PipelineOptions)
    links: LinkModel = "worker"
    overlap_compute: bool = True

    def __post_init__(self) -> None:
        if self.links not in LINK_MODELS:
            raise InputError(f"links '{self.links}' is not one of {', '.join(LINK_MODELS)}")
        if self.options.swap_bandwidth is None and any(x.swapped_bytes for x in self.stages):
            raise InputError("a stage that swaps takes time by swap_bandwidth: give one")


def plan_costs(
    plan: PipelinePlan,
    graph: LayerGraph,
    links: LinkModel = "worker",
    overlap_compute: bool = True,
) -> PipelineCosts:
    """Costs of a plan's stages; inputs take no time, as in the plan.

    Raises InputError for a graph that lacks layers of the plan.
    """
    free = {graph.layers[index].name for index in find_inputs(graph)}
    stages = []
    for stage in plan.stages:
        missing = [name for name in stage.layers if name not in graph.index]
        if missing:
            raise InputError(f"the graph has no layer '{missing[0]}': give the plan's own graph")
        names = [name for name in stage.layers if name not in free]
        layers = [graph.layers[graph.index[name]] for name in names]
        stages.append(
            StageCosts(
                forward_seconds=sum(layer.forward_seconds for layer in layers),
                backward_seconds=sum(layer.backward_seconds for layer in layers),
                update_seconds=sum(layer.update_seconds for layer in layers),
                parameter_bytes=stage.parameter_bytes,
                kept_bytes=stage.kept_bytes,
                crossing_bytes=stage.activation_bytes,
                returned_bytes=stage.returned_bytes,
                fixed_bytes=stage.fixed_bytes,
                swapped_bytes=stage.swapped_bytes,
            )
        )
    level_replicas = tuple(stage.level_replicas for stage in plan.stages)
    return PipelineCosts(
        tuple(stages), plan.levels, level_replicas, plan.options, links, overlap_compute
    )
