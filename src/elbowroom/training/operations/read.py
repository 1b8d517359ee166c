"""Reader of a graph's nodes: which spelling a node is, and its arguments by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from elbowroom.training.layers import attribute
from elbowroom.training.operations import dense, forms
from elbowroom.training.operations.call import UNKNOWN, Call, Found, NoRuleError, Read, Tensor
from elbowroom.training.operations.operation import Stored
from elbowroom.training.operations.pointwise import function_of, module_function, pointwise
from elbowroom.training.operations.table import (
    ATEN,
    FUNCTIONS,
    METHODS,
    MODULES,
    RENAMED,
    Rule,
    Spelling,
)
from elbowroom.training.traced import TracedLayer, TracedModel

_VARIADIC = ("permute",)
_COUNTER = "num_batches_tracked"


class State(NamedTuple):
    """Parameters and buffers of a model: by name, and the name of each."""

    tensors: Mapping[str, torch.Tensor]
    names: Mapping[int, str]


def state_of(model: nn.Module) -> State:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return State(tensors, {id(tensor): name for name, tensor in tensors.items()})


class Reader:
    """Reader of one traced model's layers, in order."""

    def __init__(self, traced: TracedModel) -> None:
        self.graph = traced.graph.module
        self.state = state_of(traced.model)
        self.tensors: dict[str, Tensor] = {}
        self._layers = {x.node: x for x in traced.layers if x.node is not None}

    def spelling(self, layer: TracedLayer) -> Spelling | None:
        node = layer.node
        if node is None:
            return None
        if node.op == "call_module":
            return MODULES.get(type(self._module(node)))
        if node.op == "call_method":
            return METHODS.get(str(node.target))
        if isinstance(node.target, torch._ops.OpOverload):
            return ATEN.get(node.target._opname) if node.target.namespace == "aten" else None
        return FUNCTIONS.get(node.target) if node.op == "call_function" else None

    def found(self, layer: TracedLayer, out: Tensor) -> Found:
        """What the rule for a layer says. Raises NoRuleError if there is none for it."""
        assert layer.node is not None
        spelling, effects = self.spelling(layer), self._effects(layer)
        if spelling is None:
            if effects:
                raise NoRuleError("something else runs with it")
            return self._pointwise(layer.node, out)
        call = Call({**self._values(layer, spelling), **effects}, out, self.tensors, {})
        call.state = self.state.tensors
        found = spelling.rule(call)
        call.finish()
        return found

    def stored(self, layer: TracedLayer) -> dict[str, str]:
        """Parameters and buffers that a layer uses, by their own names."""
        found: dict[str, str] = {}
        for node in layer.nodes:
            used: Iterable[Any] = ()
            if node.op == "call_module":
                module = self._module(node)
                used = (*module.parameters(), *module.buffers())
            elif node.op == "get_attr":
                used = (attribute(self.graph, str(node.target)),)
            names = [self.state.names.get(id(tensor)) for tensor in used]
            found |= {name: name for name in names if name is not None}
        return found

    def _pointwise(self, node: fx.Node, out: Tensor) -> Found:
        if node.op == "call_module":
            module = self._module(node)
            known = module_function(module)
            if known is None:
                raise NoRuleError(f"{type(module).__name__} has no rule")
            function, kwargs = known
            _check_module(module)
            args = self._resolved(node.args)
            if node.kwargs or len(args) != 1:
                raise NoRuleError("more arguments")
        else:
            named = function_of(node.target) if node.op != "placeholder" else None
            if named is None:
                raise NoRuleError(f"{node.target} has no rule")
            function, args = named, self._resolved(node.args)
            kwargs = {key: self._value(value) for key, value in node.kwargs.items()}
        call = Call({}, out, self.tensors, self.state.tensors)
        return pointwise(call, function, args, kwargs)

    def _values(self, layer: TracedLayer, spelling: Spelling) -> dict[str, Any]:
        node = layer.node
        assert node is not None
        if node.op == "call_module":
            module = self._module(node)
            _check_module(module)
            if isinstance(module, nn.MultiheadAttention):
                values = self._attention(node, module)
            else:
                if node.kwargs or len(node.args) != 1:
                    raise NoRuleError("more arguments")
                values = {"input": self._value(node.args[0])}
            values |= {name: self._held(module, name) for name in spelling.names}
        elif isinstance(node.target, torch._ops.OpOverload):
            values = self._aten_values(node, spelling.rule)
        else:
            args = self._resolved(node.args)
            names = spelling.names
            if spelling.rule is forms.reshape:
                args = args[:1]
            elif node.target in _VARIADIC and len(args) > 2:
                args = (args[0], args[1:])
            if len(args) > len(names):
                raise NoRuleError("more arguments")
            values = dict(zip(names, args, strict=False))
            if spelling.rule is not forms.reshape:
                values |= {_renamed(k): self._value(v) for k, v in node.kwargs.items()}
        values = {**spelling.more, **values}
        if spelling.rule is dense.first_of_pair:
            self._check_pair(node)
            values.pop("index", None)
        return _with_space(values, self.tensors)

    def _aten_values(self, node: fx.Node, rule: Rule) -> dict[str, Any]:
        assert isinstance(node.target, torch._ops.OpOverload)
        values: dict[str, Any] = {}
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            values[argument.name] = self._value(value)
        values |= {key: self._value(value) for key, value in node.kwargs.items()}
        if rule is forms.reshape:
            return {"input": values["self"]}
        keeps = "adaptive" in node.target._opname
        return {key if keeps and key != "self" else _renamed(key): v for key, v in values.items()}

    def _attention(self, node: fx.Node, module: nn.MultiheadAttention) -> dict[str, Any]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        args = self._resolved(node.args)
        values = dict(zip((*names, "average_attn_weights", "is_causal"), args, strict=False))
        values |= {key: self._value(value) for key, value in node.kwargs.items()}
        if not all(_is_first_of(user, node) for user in node.users):
            raise NoRuleError("its weights are read")
        if module.bias_k is not None or module.add_zero_attn or not module._qkv_same_embed_dim:
            raise NoRuleError("other keys and values")
        out = module.out_proj
        values |= {"out_proj.weight": self._tensor(out.weight), "out_proj.bias": None}
        if out.bias is not None:
            values["out_proj.bias"] = self._tensor(out.bias)
        return values

    def _check_pair(self, node: fx.Node) -> None:
        pair = node.args[0]
        layer = self._layers.get(pair) if isinstance(pair, fx.Node) else None
        if layer is None or layer.value is None or layer.value.is_plain:
            raise NoRuleError("no pair")
        if layer.name not in self.tensors or node.args[1] != 0:
            raise NoRuleError("not the first of a pair")

    def _effects(self, layer: TracedLayer) -> dict[str, Any]:
        """The counter of batches that a norm counts up; raises NoRuleError for all else."""
        needed = {layer.node}
        for node in reversed(layer.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        others = [x for x in layer.nodes if x not in needed and x.op != "get_attr"]
        if not others:
            return {}
        counted = [self._resolved(node.args) for node in others]
        is_count = len(others) == 1 and others[0].target is torch.ops.aten.add_.Tensor
        if not is_count or counted[0][1:] != (1,) or not isinstance(counted[0][0], Stored):
            raise NoRuleError("something else runs with it")
        return {_COUNTER: counted[0][0]}

    def _module(self, node: fx.Node) -> nn.Module:
        return self.graph.get_submodule(str(node.target))

    def _held(self, module: nn.Module, name: str) -> Any:
        """An attribute of a module, or what it was given in its call."""
        if name == "dropout" and not module.training:
            return 0.0
        if isinstance(module, nn.modules.batchnorm._NormBase) and name == _COUNTER:
            is_counted = module.training and module.track_running_stats
            return self._tensor(module.num_batches_tracked) if is_counted else None
        value = getattr(module, name, None)
        return self._tensor(value) if isinstance(value, torch.Tensor) else value

    def _tensor(self, tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        name = self.state.names.get(id(tensor))
        return UNKNOWN if name is None else Stored(name)

    def _resolved(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self._value(value) for value in values)

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            layer = self._layers.get(value)
            if layer is not None:
                return Read(layer.name) if layer.name in self.tensors else UNKNOWN
            if value.op == "get_attr":
                found = attribute(self.graph, str(value.target))
                return self._tensor(found) if isinstance(found, torch.Tensor) else UNKNOWN
            return UNKNOWN
        if isinstance(value, tuple | list):
            return self._resolved(value)
        holds_nodes = any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(value))
        return UNKNOWN if holds_nodes or isinstance(value, dict | slice) else value


def _with_space(values: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Interpolations have one spelling for any number of dimensions."""
    source = values.get("input")
    is_resize = "scale_factor" in values or "size" in values
    if is_resize and "num_space" not in values and isinstance(source, Read):
        values["num_space"] = len(tensors[source.layer].shape) - 2
    return values


def _check_module(module: nn.Module) -> None:
    """Hooks, and a forward of an object's own, may do anything."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    if any(hooks) or "forward" in vars(module):
        raise NoRuleError("the module has hooks")


def _is_first_of(user: fx.Node, pair: fx.Node) -> bool:
    return user.target is operator.getitem and user.args == (pair, 0)


def _renamed(name: str) -> str:
    return RENAMED.get(name, name)
