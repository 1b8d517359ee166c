"""Layers of a model, found in the graph of its forward.

- A call of a module, a function or a method that gives tensors is a layer, and so is an input.
- Numbers (sizes, for example) are no layers: each layer that uses one computes it again from the
  tensor that it is taken from, and so reads that tensor. Thus only tensors cross from layer to
  layer, and another batch may have other sizes.
- What has no input and is read by nobody, such as a counter of batches, runs with the layer after
  it.
- If the model returns more than what one last layer gives, a layer of no time, ``output``, reads
  that, and everything that is read by nobody else.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from elbowroom.core.errors import UntraceableModelError
from elbowroom.core.layer_graph import Edge
from elbowroom.training.outcome import untouched
from elbowroom.training.traced import Tied, TracedLayer, TracedModel
from elbowroom.training.tracing import ModelGraph, find_graph
from elbowroom.training.values import copy_of, tensors_in, value_of

_OUTPUT = "output"
_LONGEST_DESCRIPTION = 80


def trace_model(model: nn.Module, inputs: Any, *, leaves: bool = False) -> TracedModel:
    """Trace a model's layers in its present mode; runs it a few times, and leaves it as it was.

    ``inputs`` is a tensor, a tuple of positional or a dict of named arguments. With ``leaves``, the
    children of an ``nn.Sequential`` are traced too, down to modules of ``torch.nn``. Raises
    InputError if the model does not run on them, UntraceableModelError, with the line or operation,
    if its forward cannot be written down as layers.
    """
    graph = find_graph(model, inputs, leaves=leaves)
    run = _Run(graph.module)
    with untouched(model), torch.enable_grad():
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        values = graph.placeholder_values(copy_of(inputs))
        run.run(*values, enable_io_processing=False)
        changed = [
            name
            for name, buffer in model.named_buffers()
            if name not in before or not torch.equal(buffer, before[name])
        ]
    return _Finder(model, graph, run, frozenset(changed)).traced()


class _Run(fx.Interpreter):
    """Interpreter that keeps all values, and notes which storages each node writes into."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.written: dict[fx.Node, set[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = [tensor for node in n.all_input_nodes for tensor in tensors_in(self.env[node])]
        versions = [tensor._version for tensor in read]
        value = super().run_node(n)
        pairs = zip(read, versions, strict=True)
        self.written[n] = _storages(tensor for tensor, old in pairs if tensor._version != old)
        self.values[n] = value
        return value


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}


class _Finder:
    """Search for the layers in one recorded run."""

    def __init__(
        self, model: nn.Module, graph: ModelGraph, run: _Run, changed: frozenset[str]
    ) -> None:
        self.model, self.graph, self.run, self.changed = model, graph, run, changed
        self.nodes: list[fx.Node] = list(graph.module.graph.nodes)
        self.place = {node: place for place, node in enumerate(self.nodes)}
        self.names: dict[fx.Node, str] = {}
        self.taken = {_OUTPUT}
        self.state_names = {id(p): name for name, p in model.named_parameters()}
        self.state_names |= {id(b): name for name, b in model.named_buffers()}
        self.state_storages = {
            name: _storages([tensor])
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }

    def traced(self) -> TracedModel:
        layers = [self._layer(*found) for found in self._find()]
        output = self._read_by([self.nodes[-1]])
        results = tuple(self.names[node] for node in output.sources)
        if not results:
            raise UntraceableModelError("the forward gives no tensor of its inputs or layers")
        outputs = (*output.helpers, self.nodes[-1])
        unread, shared = self._unread(layers), self._shared(layers)
        stale = tuple(self._stale(layers))
        if results != unread or len(results) != 1:
            layers.append(_output(self.names.values(), {*results, *unread}))
        training = self.model.training
        return TracedModel(
            self.model, self.graph, tuple(layers), results, outputs, training, shared, stale
        )

    def _find(self) -> list[_Found]:
        """Nodes that are layers; gives them their names."""
        found: list[_Found] = []
        effects: list[fx.Node] = []
        for node in self.nodes:
            if not self._is_layer(node):
                continue
            if node.op != "placeholder" and not node.users and not self._read_by([node]).sources:
                effects.append(node)
                continue
            self.names[node] = self._name(node)
            found.append(_Found(node, effects))
            effects = []
        if found:  # what is left has no layer after it
            found[-1].effects.extend(effects)
        return found

    def _is_layer(self, node: fx.Node) -> bool:
        if node.op in ("get_attr", "output") or not tensors_in(self.run.values[node]):
            return False
        is_part = node.target in (operator.getitem, builtins.getattr)
        return bool(node.users) or (node.op != "placeholder" and not is_part)

    def _name(self, node: fx.Node) -> str:
        name = str(node.target) if node.op in ("call_module", "placeholder") else node.name
        while name in self.taken:
            name = f"{name}_1"
        self.taken.add(name)
        return name

    def _layer(self, node: fx.Node, effects: list[fx.Node]) -> TracedLayer:
        read = self._read_by([*effects, node])
        nodes = sorted({*read.helpers, *effects, node}, key=self.place.__getitem__)
        parameters, state = self._state(nodes)
        written = self.run.written[node]
        return TracedLayer(
            name=self.names[node],
            description=_describe(node, self.graph.module),
            node=node,
            nodes=tuple(nodes),
            sources=tuple(self.names[source] for source in read.sources),
            value=value_of(self.names[node], self.run.values[node]),
            overwrites=tuple(self.names[s] for s in read.sources if written & self._storage(s)),
            parameters=parameters,
            state=state,
        )

    def _unread(self, layers: list[TracedLayer]) -> tuple[str, ...]:
        read = {source for layer in layers for source in layer.sources}
        return tuple(layer.name for layer in layers if layer.name not in read)

    def _read_by(self, nodes: list[fx.Node]) -> _Read:
        """Layers that nodes read, directly or through numbers and parameters."""
        seen: set[fx.Node] = set()
        queue = [source for node in nodes for source in node.all_input_nodes]
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                if node not in self.names:
                    queue += node.all_input_nodes
        ordered = sorted(seen, key=self.place.__getitem__)
        return _Read(
            tuple(node for node in ordered if node in self.names),
            tuple(node for node in ordered if node not in self.names),
        )

    def _state(self, nodes: list[fx.Node]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        parameters: dict[str, None] = {}
        state: dict[str, None] = {}
        for tensor in _tensors_of(nodes, self.graph.module):
            name = self.state_names.get(id(tensor))
            if name is None:
                continue
            if isinstance(tensor, nn.Parameter):
                parameters[name] = None
            if tensor.requires_grad or name in self.changed:
                state[name] = None
        written = {storage for node in nodes for storage in self.run.written.get(node, ())}
        state |= {n: None for n, storage in self.state_storages.items() if storage & written}
        return tuple(parameters), tuple(state)

    def _storage(self, node: fx.Node) -> set[int]:
        return _storages(tensors_in(self.run.values[node]))

    def _overwritten(self, node: fx.Node) -> dict[fx.Node, set[int]]:
        """Nodes into whose output a layer writes while others read it, and the memory in common.

        Views that it writes through, and sizes, are no such readers.
        """
        written = self.run.written[node]
        found = {}
        for other in self.nodes[: self.place[node]] if written else ():
            shared = written & self._storage(other)
            if other.op == "get_attr" or not shared:
                continue
            for reader in other.users:
                is_view = self.place[reader] < self.place[node] and written & self._storage(reader)
                is_number = reader.op != "output" and not tensors_in(self.run.values[reader])
                if reader is not node and not is_view and not is_number:
                    found[other] = shared
        return found

    def _stale(self, layers: list[TracedLayer]) -> Iterator[Edge]:
        """Layers that write, and who then reads what was made before of the same memory."""
        for layer in layers:
            assert layer.node is not None
            for other in self._overwritten(layer.node):
                for reader in other.users:
                    if self.place[reader] > self.place[layer.node]:
                        yield Edge(layer.name, self.names.get(reader, reader.name))

    def _shared(self, layers: list[TracedLayer]) -> tuple[Tied, ...]:
        """Memory that a layer writes into and others read, with all layers that give or read it.

        In one stage they run in the order of the model. In several each would have a copy.
        """
        found: dict[tuple[str, ...], Tied] = {}
        for layer in layers:
            assert layer.node is not None
            for other, memory in self._overwritten(layer.node).items():
                givers = {x.name for x in layers if x.node and self._storage(x.node) & memory}
                users = {x.name for x in layers if givers.intersection(x.sources)}
                all_names = givers | users | {layer.name}
                who = tuple(x.name for x in layers if x.name in all_names)
                found.setdefault(who, Tied(self.names.get(other, other.name), who))
        return tuple(found.values())


class _Found(NamedTuple):
    """A node that is a layer, and the nodes that run with it although nobody reads them."""

    node: fx.Node
    effects: list[fx.Node]


class _Read(NamedTuple):
    """Inputs of some nodes: layers, and helpers that each reader computes from them again."""

    sources: tuple[fx.Node, ...]
    helpers: tuple[fx.Node, ...]


def _output(names: Iterable[str], read: set[str]) -> TracedLayer:
    sources = tuple(name for name in names if name in read)
    return TracedLayer(_OUTPUT, "Output", None, (), sources, None)


def _tensors_of(nodes: list[fx.Node], module: fx.GraphModule) -> Iterator[torch.Tensor]:
    """Parameters and buffers that nodes use."""
    for node in nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            yield from called.parameters()
            yield from called.buffers()
        elif node.op == "get_attr":
            found = attribute(module, str(node.target))
            if isinstance(found, torch.Tensor):
                yield found


def attribute(module: nn.Module, name: str) -> Any:
    """The attribute of a module with a dotted name."""
    return operator.attrgetter(name)(module)


def _describe(node: fx.Node, module: fx.GraphModule) -> str:
    if node.op == "placeholder":
        return "Input"
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        text = repr(called)
        is_short = "\n" not in text and len(text) <= _LONGEST_DESCRIPTION
        return text if is_short else type(called).__name__
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))
