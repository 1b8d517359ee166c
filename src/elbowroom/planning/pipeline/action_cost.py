"""What the actions of a pipeline cost: seconds and bytes of its stages, and the links between them.

Two models of links. With ``worker`` each worker, and each unit of a level above the lowest, sends
and receives at once at the full bandwidth, as a network card does; all that it sends shares its way
out. With ``cut`` all activations and gradients between two stages share one link in each unit that
holds both, as the planner reckons (2 a / B, arXiv 1806.03377); weights have links of their own.

Replicas agree on weights in the seconds of ``planning.stage_cost``, level by level. With overlap
``max`` that begins with the last backward before it, gradients being there layer by layer; with
``sum`` when that has ended. The planner's ``max`` hides it behind the forward of the round too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.cuts import find_inputs
from elbowroom.plans.pipeline import Level, PipelineOptions, PipelinePlan

LinkModel = Literal["worker", "cut"]
LINK_MODELS: tuple[LinkModel, ...] = get_args(LinkModel)


@dataclass(frozen=True)
class StageCosts:
    """Of one minibatch on one worker of a stage.

    ``kept_bytes`` is what a minibatch keeps between forward and backward, ``crossing_bytes`` the
    activations over the cut behind the stage; ``returned_bytes`` of gradients come back, as many if
    it is None. ``fixed_bytes`` of memory are held once.
    """

    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int = 0
    kept_bytes: int = 0
    crossing_bytes: int = 0
    update_seconds: float = 0.0
    returned_bytes: int | None = None
    fixed_bytes: int = 0

    @property
    def gradient_bytes(self) -> int:
        """Over the cut behind the stage."""
        return self.crossing_bytes if self.returned_bytes is None else self.returned_bytes


@dataclass(frozen=True)
class PipelineCosts:
    """Stages, and the ``levels`` of links that join them, the lowest first.

    ``level_replicas`` are those of each stage, the outermost level first; they may be left out on
    one level. Of ``options``, ``sync`` and ``overlap`` count. Where transfers do not
    ``overlap_compute``, they take the compute of both ends as well. Raises InputError for another
    model of links.
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


def plan_costs(
    plan: PipelinePlan,
    graph: LayerGraph,
    links: LinkModel = "worker",
    overlap_compute: bool = True,
) -> PipelineCosts:
    """Costs of a plan's stages; inputs take no time, as in the plan.

    Raises InputError for a graph without the plan's layers.
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
            )
        )
    level_replicas = tuple(stage.level_replicas for stage in plan.stages)
    return PipelineCosts(
        tuple(stages), plan.levels, level_replicas, plan.options, links, overlap_compute
    )
