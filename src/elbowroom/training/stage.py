"""Stage modules: some layers of a traced model as a module of their own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import SplitError
from elbowroom.training.layers import attribute
from elbowroom.training.traced import TracedModel
from elbowroom.training.values import Value


class Part(NamedTuple):
    """Layers of one stage by name, and the layers whose outputs come in and go out."""

    layers: tuple[str, ...]
    receives: tuple[str, ...]
    loads: tuple[str, ...]
    passes: tuple[str, ...]


class StageModule(nn.Module):
    """Layers of a model as a module of their own.

    ``forward(*received, *loaded)`` returns a tuple of the tensors in ``passes``; in the last stage,
    what the model returns.

    Attributes:
        body: runs the layers; in its ``state_dict`` the weights have their names in the model,
            however it is split into stages.
        layers: names, in the order in which they run.
        receives: names of the tensors that the previous stage passes (``TracedModel.tensors`` has
            their shapes, and whether they need gradients).
        loads: names of the model's inputs that it reads (``TracedModel.named_inputs``).
        passes: names of the tensors that the next stage receives; empty for the last.
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
        # Do not call train(): what the model keeps in another mode, such as a frozen norm, stays
        # so.
        self.training = body.training = traced.training

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.body(*tensors)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as in any module. Raises SplitError where tracing has fixed the mode."""
        if self.only_mode is not None and mode != self.only_mode:
            raise SplitError(
                f"the model was traced with training={self.only_mode}, and what it does depends on "
                "that outside of torch.nn modules: use nn.Dropout instead of functional dropout, "
                "or trace and split it once in each mode"
            )
        return super().train(mode)


class _Rebuild(nn.Module):
    """Module from tensors to a layer's output value, which may nest them."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.value.unflatten(tensors)


class _Flatten(nn.Module):
    """Module from a layer's output value to its tensors."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.value = value

    def forward(self, value: Any) -> tuple[torch.Tensor, ...]:
        return self.value.flatten(value)


class _Result(nn.Module):
    """Module from leaves to what the model returns."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)


def build_stage(traced: TracedModel, part: Part, is_last: bool) -> StageModule:
    """Build a module of some layers. Only a model's last stage returns what the model returns."""
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
    return StageModule(fx.GraphModule(builder.root, builder.graph, "Body"), traced, part)


class _Builder:
    """Copier of nodes from the model's graph into a new one."""

    def __init__(self, traced: TracedModel) -> None:
        self.traced, self.graph = traced, fx.Graph()
        self.root: dict[str, Any] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._tensors: dict[str, list[fx.Node]] = {}

    def take(self, name: str, is_overwritten: bool) -> None:
        """Take a layer's output from outside; if it is written into, clone it first.

        The tensor that comes in may also be passed on unchanged, or be a leaf, into which autograd
        forbids writing.
        """
        layer, value = self.traced.by_name[name], layer_value(self.traced, name)
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
        """Copy nodes to run here; nodes that are here already are not run twice."""
        module = self.traced.graph.module
        for node in sorted({*nodes} - {*self._copies}, key=self.traced.places.__getitem__):
            if node.op in ("placeholder", "output"):
                continue
            if node.op in ("call_module", "get_attr"):
                self.root[str(node.target)] = attribute(module, str(node.target))
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)

    def give(self, names: Sequence[str]) -> None:
        """Make outputs of layers the graph's result, as one flat tuple of tensors."""
        given: list[fx.Node] = []
        for name in names:
            value, node = layer_value(self.traced, name), self.traced.by_name[name].node
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
        """Make what the model returns the graph's result."""
        result = fx.map_arg(self.traced.output_nodes[-1].args[0], self._copies.__getitem__)
        spec = self.traced.graph.result
        self.graph.output(result if spec is None else self._call(_Result(spec), (result,)))

    def _call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        name = f"_elbowroom_{len(self.root)}"
        self.root[name] = module
        return self.graph.create_node("call_module", name, args)


def layer_value(traced: TracedModel, name: str) -> Value:
    value = traced.by_name[name].value
    assert value is not None, "nothing reads the output layer"
    return value


def _tensors(traced: TracedModel, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(tensor for name in names for tensor in layer_value(traced, name).names)
