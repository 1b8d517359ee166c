"""Cuts a traced model into stages, as a plan says.

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

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import SplitError
from elbowroom.core.pipeline_plan import PipelinePlan
from elbowroom.pipeline.layers import attribute
from elbowroom.pipeline.traced import TracedModel
from elbowroom.pipeline.values import Value

_SHOWN = 5


class Part(NamedTuple):
    """Names of the layers of one stage, and of those whose outputs come in and go out."""

    layers: tuple[str, ...]
    receives: tuple[str, ...]
    loads: tuple[str, ...]
    passes: tuple[str, ...]


class Stage(nn.Module):
    """Layers of a model as a module of their own.

    ``forward(*received, *loaded)`` returns a tuple of the tensors in ``passes``; of the last stage,
    what the model returns.

    Attributes:
        body: runs the layers; in its ``state_dict`` the weights have the names that the model has
            for them, whatever the stages are.
        layers: names, in the order in which they run.
        receives: names of the tensors that the stage before passes (``TracedModel.tensors`` has
            their shapes, and whether they need gradients).
        loads: names of the model's inputs that it reads (``TracedModel.named_inputs``).
        passes: names of the tensors that the stage behind receives; empty for the last.
        only_mode: the one mode in which it does what the model does; None if it does in both.

    """

    def __init__(self, body: fx.GraphModule, traced: TracedModel, part: Part) -> None:
        super().__init__()
        self.body = body
        self.layers = part.layers
        self.receives = _tensors(traced, part.receives)
        self.loads = _tensors(traced, part.loads)
        self.passes = _tensors(traced, part.passes)
        self.only_mode = traced.training if traced.graph.mode_matters else None
        # Not by train(): what the model keeps in another mode, such as a frozen norm, stays so.
        self.training = body.training = traced.training

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.body(*tensors)

    def train(self, mode: bool = True) -> Self:
        """As of any module. Raises SplitError where tracing has fixed the mode."""
        if self.only_mode is not None and mode != self.only_mode:
            raise SplitError(
                f"the model was traced with training={self.only_mode}, and what it does depends on "
                "that outside of torch.nn modules: use nn.Dropout instead of functional dropout, "
                "or trace and split it once in each mode"
            )
        return super().train(mode)


class _Rebuild(nn.Module):
    """Tensors -> what a layer gave."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.value.unflatten(tensors)


class _Flatten(nn.Module):
    """What a layer gave -> its tensors."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def forward(self, value: Any) -> tuple[torch.Tensor, ...]:
        return self.value.flatten(value)


class _Result(nn.Module):
    """Leaves -> what the model returns."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)


def split(traced: TracedModel, plan: PipelinePlan) -> list[Stage]:
    """One module for each stage of a plan; replicas of a stage all run the same.

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


def build_stage(traced: TracedModel, part: Part, is_last: bool) -> Stage:
    """A module of some layers. Only the last one of a model gives what that returns."""
    builder = _Builder(traced)
    known = traced.by_name
    overwritten = {name for layer in part.layers for name in known[layer].overwrites}
    for name in (*part.receives, *part.loads):
        builder.take(name, name in overwritten)
    builder.copy([node for name in part.layers for node in known[name].nodes])
    if is_last:
        builder.copy(traced.output_nodes)
        builder.give_result()
    else:
        builder.give(part.passes)
    return Stage(fx.GraphModule(builder.root, builder.graph, "Body"), traced, part)


class _Builder:
    """Copies nodes of the model's graph into another one."""

    def __init__(self, traced: TracedModel) -> None:
        self.traced, self.graph = traced, fx.Graph()
        self.root: dict[str, Any] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._tensors: dict[str, list[fx.Node]] = {}

    def take(self, name: str, is_overwritten: bool) -> None:
        """A layer's output comes from outside. What is written into must be a copy.

        What comes in may be passed on as it is, or be a leaf that autograd lets nobody write into.
        """
        layer, value = self.traced.by_name[name], _value(self.traced, name)
        start = sum(map(len, self._tensors.values()))
        places = range(start, start + len(value.names))
        tensors = [self.graph.create_node("placeholder", f"input_{k}") for k in places]
        self._tensors[name] = tensors
        if is_overwritten:
            tensors = [self.graph.call_method("clone", (tensor,)) for tensor in tensors]
        assert layer.node is not None
        if value.is_plain:
            self._copies[layer.node] = tensors[0]
        else:
            self._copies[layer.node] = self._call(_Rebuild(value), tuple(tensors))

    def copy(self, nodes: Sequence[fx.Node]) -> None:
        """Runs nodes here. Those that are there already are not run twice."""
        module = self.traced.graph.module
        for node in sorted({*nodes} - {*self._copies}, key=self.traced.places.__getitem__):
            if node.op in ("placeholder", "output"):
                continue
            if node.op in ("call_module", "get_attr"):
                self.root[str(node.target)] = attribute(module, str(node.target))
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)

    def give(self, names: Sequence[str]) -> None:
        """Outputs of layers leave as one tuple of tensors."""
        given: list[fx.Node] = []
        for name in names:
            value, node = _value(self.traced, name), self.traced.by_name[name].node
            assert node is not None
            if name in self._tensors:
                given += self._tensors[name]
            elif value.is_plain:
                given.append(self._copies[node])
            else:
                flat = self._call(_Flatten(value), (self._copies[node],))
                places = range(len(value.names))
                given += [self.graph.call_function(operator.getitem, (flat, k)) for k in places]
        self.graph.output(tuple(given))

    def give_result(self) -> None:
        """What the model returns leaves."""
        result = fx.map_arg(self.traced.output_nodes[-1].args[0], self._copies.__getitem__)
        spec = self.traced.graph.result
        self.graph.output(result if spec is None else self._call(_Result(spec), (result,)))

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        name = f"_elbowroom_{len(self.root)}"
        self.root[name] = module
        return self.graph.create_node("call_module", name, args)


def _value(traced: TracedModel, name: str) -> Value:
    value = traced.by_name[name].value
    assert value is not None, "nothing reads the output layer"
    return value


def _tensors(traced: TracedModel, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(tensor for name in names for tensor in _value(traced, name).names)


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
        constants = _value(traced, name).constants
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
