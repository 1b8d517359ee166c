"""What the actions of a pipeline cost: seconds and bytes of its stages, and the links between them.

Two models of links. With ``worker`` each worker sends and receives at once at the full bandwidth,
as a network card does; all that it sends shares its way out. With ``cut`` all activations and
gradients between two stages share one link, as the planner reckons (2 a / B, arXiv 1806.03377).

Replicas agree on weights in the seconds of ``planning.stage_cost``. With overlap ``max`` that
begins with the last backward before it, gradients being there layer by layer; with ``sum`` when
that has ended. The planner's ``max`` hides it behind the forward of the round too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.core.layer_graph import LayerGraph
from elbowroom.core.pipeline_plan import PipelineOptions, PipelinePlan
from elbowroom.planning.cuts import find_inputs

LinkModel = Literal["worker", "cut"]
LINK_MODELS: tuple[LinkModel, ...] = get_args(LinkModel)


@dataclass(frozen=True)
class StageCosts:
    """Of one minibatch on one worker of a stage.

    ``kept_bytes`` is what a minibatch keeps between forward and backward, ``crossing_bytes`` the
    activations over the cut behind the stage, and as many bytes of gradients come back.
    """

    forward_seconds: float
    backward_seconds: float
    parameter_bytes: int = 0
    kept_bytes: int = 0
    crossing_bytes: int = 0
    update_seconds: float = 0.0


@dataclass(frozen=True)
class PipelineCosts:
    """Stages, and what joins them: ``bandwidth`` in bytes/s.

    Of ``options``, ``sync`` and ``overlap`` count. Where transfers do not ``overlap_compute``, they
    take the compute of both ends as well. Raises InputError for links that carry nothing.
    """

    stages: tuple[StageCosts, ...]
    bandwidth: float
    options: PipelineOptions = field(default_factory=PipelineOptions)
    links: LinkModel = "worker"
    overlap_compute: bool = True

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise InputError(f"a bandwidth of {self.bandwidth} bytes/s carries nothing")
        if self.links not in LINK_MODELS:
            raise InputError(f"links '{self.links}' is not one of {', '.join(LINK_MODELS)}")

    def sync_bytes(self, stage: int, replicas: int) -> int:
        """What all replicas of a stage move in one reduce."""
        return self.options.sync_factor * (replicas - 1) * self.stages[stage].parameter_bytes


def plan_costs(
    plan: PipelinePlan,
    graph: LayerGraph,
    links: LinkModel = "worker",
    overlap_compute: bool = True,
) -> PipelineCosts:
    """Costs of a plan's stages; inputs take no time, as in the plan.

    Raises InputError for a graph without the plan's layers, and for a plan on several levels, whose
    links are not all alike.
    """
    used = [level for level in plan.levels if level.num_units > 1] or list(plan.levels[:1])
    if len(used) != 1:
        raise InputError(f"a plan on {len(used)} levels: simulate one on a single level")
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
                parameter_bytes=stage.parameter_bytes,
                kept_bytes=stage.memory_bytes // stage.in_flight - stage.parameter_bytes,
                crossing_bytes=stage.transfer_bytes // 2,
            )
        )
    return PipelineCosts(tuple(stages), used[0].bandwidth, plan.options, links, overlap_compute)
