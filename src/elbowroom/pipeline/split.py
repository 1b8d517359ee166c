"""The cut of a traced model into the stages of a plan.

Stages share the model's modules and parameters: what one trains, the model has. Run one after the
other, they compute what the model does, to the bit, if they draw random numbers in its order.

What a stage needs of earlier ones it receives, even if it only passes it on: tensors that skip
stages travel with the others, from neighbour to neighbour. Inputs of the model do not travel, as
each stage loads those that it reads; so the planner counts, too.

Tied weights must stay in one stage. In two, each would train a copy of its own: with weights of
several minibatches in flight there is no moment at which the copies are the same, and to sum their
gradients each minibatch would need a link between stages that no plan has counted.
"""

from __future__ import annotations

from collections import Counter

from elbowroom.core.errors import SplitError
from elbowroom.plans.pipeline import PipelinePlan
from elbowroom.training.stage import Part, StageModule, build_stage, layer_value
from elbowroom.training.traced import TracedModel

_SHOWN = 5


def split(traced: TracedModel, plan: PipelinePlan) -> list[StageModule]:
    """Cut a model into one module for each stage of a plan; replicas of a stage run the same.

    Raises SplitError if the plan is not of this model's layers, if a stage reads what a later one
    computes, and if it puts tied weights or numbers between stages.
    """
    stage_of = _stage_of(traced, plan)
    _check_order(traced, stage_of)
    _check_tied(traced, stage_of)
    parts = _parts(traced, stage_of, len(plan.stages))
    for part in parts[:-1]:
        _check_constants(traced, part)
    last = len(parts) - 1
    return [build_stage(traced, part, is_last=k == last) for k, part in enumerate(parts)]


def _stage_of(traced: TracedModel, plan: PipelinePlan) -> dict[str, int]:
    given = Counter(name for stage in plan.stages for name in stage.layers)
    for what, names in (
        ("does not have", [name for name in traced.by_name if name not in given]),
        ("has unknown", [name for name in given if name not in traced.by_name]),
        ("has more than once", [name for name, count in given.items() if count > 1]),
    ):
        if names:
            shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
            raise SplitError(
                f"the plan {what} layers {shown} ({len(names)} in all): plan again with a profile "
                "of this model"
            )
    return {name: k for k, stage in enumerate(plan.stages) for name in stage.layers}


def _check_order(traced: TracedModel, stage_of: dict[str, int]) -> None:
    for source, reader in traced.edges:
        is_load = traced.by_name[source].is_input
        if stage_of[source] > stage_of[reader] and not is_load:
            raise SplitError(
                f"layer '{reader}' in stage {stage_of[reader]} reads '{source}', which stage "
                f"{stage_of[source]} computes: put it there or into a later stage"
            )
    last = max(stage_of.values())
    final = traced.layers[-1].name
    if stage_of[final] != last:
        raise SplitError(
            f"layer '{final}' gives what the model returns, but is in stage {stage_of[final]} of "
            f"{last}: put it into the last stage"
        )


def _check_tied(traced: TracedModel, stage_of: dict[str, int]) -> None:
    for tied in traced.tied:
        stages = sorted({stage_of[name] for name in tied.layers})
        if len(stages) > 1:
            where = ", ".join(f"'{name}' (stage {stage_of[name]})" for name in tied.layers)
            raise SplitError(
                f"'{tied.name}' is shared by layers of stages {', '.join(map(str, stages))}: "
                f"{where}. Profile the model again: plans for a profile that names them keep them "
                "in one stage; or give each layer weights of its own (untie them)"
            )


def _check_constants(traced: TracedModel, part: Part) -> None:
    for name in part.passes:
        constants = layer_value(traced, name).constants
        if constants:
            raise SplitError(
                f"layer '{name}' hands {constants[0]!r} to a later stage beside its tensors, and "
                "only tensors travel: return tensors, or plan both into one stage"
            )


def _parts(traced: TracedModel, stage_of: dict[str, int], num_stages: int) -> list[Part]:
    last_reader = dict(stage_of)
    loaders: dict[str, set[int]] = {layer.name: set() for layer in traced.layers}
    readings = [(edge.source, stage_of[edge.destination]) for edge in traced.edges]
    readings += [(name, num_stages - 1) for name in traced.results]
    for name, stage in readings:
        last_reader[name] = max(last_reader[name], stage)
        loaders[name].add(stage)
    inputs = [layer.name for layer in traced.layers if layer.is_input]
    made = [layer.name for layer in traced.layers if not layer.is_input]

    def received_by(k: int) -> tuple[str, ...]:
        return tuple(name for name in made if stage_of[name] < k <= last_reader[name])

    return [
        Part(
            layers=tuple(name for name in made if stage_of[name] == k),
            receives=received_by(k),
            loads=tuple(name for name in inputs if k in loaders[name]),
            passes=received_by(k + 1) if k + 1 < num_stages else (),
        )
        for k in range(num_stages)
    ]
