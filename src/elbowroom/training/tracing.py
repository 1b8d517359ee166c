"""A model's forward as a torch.fx graph that is checked to compute the same.

There are three ways, and the first that works is taken:

1. An ``nn.Sequential`` is its children, one after the other. What happens in them does not matter.
2. Symbolic tracing: calls of ``torch.nn`` modules, and the functions and methods between them.
3. ``torch.export``, for forwards that test shapes with Python's ``if``. Its operations are ATen's,
  its shapes and its mode are those of the batch and the model that it saw. Models that ask whether
  they are being traced may then choose other kernels, which round otherwise.

Tracing can go wrong silently: a forward that uses ``torch.no_grad()`` or tests for ``None`` is
traced as something else. So each graph is run beside the model, forward and backward, several times
in a row, and is only taken if the results agree, and the buffers and random numbers that the calls
left behind. A forward that depends on more than tensors is refused (``purity``).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from elbowroom.core.errors import InputError, UntraceableModelError, first_line, shown
from elbowroom.training.outcome import difference, outcome_of, untouched
from elbowroom.training.purity import habits_of, recomputes
from elbowroom.training.user_code import where
from elbowroom.training.values import Value, is_same_constant, tensors_in, value_of

Recompute = Literal["none", "kept", "dropped"]

RECOMPUTE_DROPPED = (
    "torch.utils.checkpoint has no effect in this model's stages, which keep all activations: to "
    "have it, build the model as nn.Sequential of blocks that use it inside"
)


class Call(NamedTuple):
    """Arguments of a call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A forward as a graph, whose modules and parameters are the model's own.

    Args:
        module: the graph; called by ``run`` only.
        keys: for each placeholder its position or name in the call; None for an exported graph,
            which has a placeholder for each leaf of the arguments.
        batch: the arguments that it was traced with, without their tensors.
        result: structure of the leaves that an exported graph returns; None for other graphs.
        mode_matters: whether the graph would differ in the other mode (``train()`` or ``eval()``).
        recompute: what became of ``torch.utils.checkpoint``: kept within layers, or traced through.

    """

    module: fx.GraphModule
    keys: tuple[int | str, ...] | None
    batch: Value
    result: pytree.TreeSpec | None
    mode_matters: bool
    recompute: Recompute = "none"

    @property
    def is_exported(self) -> bool:
        return self.keys is None

    def placeholder_values(self, inputs: Any) -> list[Any]:
        """Values for the graph's placeholders, in order.

        Raises InputError for a minibatch that differs in more than its tensors: a graph holds the
        rest of what it was traced with.
        """
        call = as_call(inputs)
        other = _form(call)
        if other.spec != self.batch.spec or other.is_tensor != self.batch.is_tensor:
            raise InputError(
                "make_batch gives a minibatch whose inputs have another structure than those of "
                "the first: give each the same tensors, by the same names"
            )
        for one, leaf in zip(self.batch.leaves, other.leaves, strict=True):
            if not is_same_constant(one, leaf):
                raise InputError(
                    f"make_batch gives the input {shown(leaf)} where the first minibatch had "
                    f"{shown(one)}, which was traced: what changes must be a tensor"
                )
        if self.keys is None:
            return list(pytree.tree_leaves(tuple(call)))
        return [call.kwargs[k] if isinstance(k, str) else call.args[k] for k in self.keys]

    def run(self, inputs: Any) -> Any:
        values = self.placeholder_values(inputs)
        return fx.Interpreter(self.module).run(*values, enable_io_processing=False)


def as_call(inputs: Any) -> Call:
    """Arguments from a batch: a tuple is positional, a dict named, all else the only argument."""
    if isinstance(inputs, tuple):
        return Call(inputs, {})
    if isinstance(inputs, dict):
        return Call((), dict(sorted(inputs.items())))
    return Call((inputs,), {})


def find_graph(model: nn.Module, inputs: Any, *, leaves: bool = False) -> ModelGraph:
    """Find a graph that computes what the model does in its present mode.

    With ``leaves`` the first way is not taken: children of an ``nn.Sequential`` are traced, too.
    Leaves the model as it was. Raises InputError if the model does not run on the batch,
    UntraceableModelError if no graph of it computes the same.
    """
    run = partial(called, model)
    with untouched(model):
        try:
            habits = habits_of(model, run, inputs)
            reference = None if habits.refused else outcome_of(model, run, inputs)
        except Exception as error:
            message = f"{type(model).__name__} does not run on this batch: {first_line(error)}"
            raise InputError(f"{message}{where(error)}: change make_batch or the model") from error
    if reference is None:
        raise _untraceable(model, habits.refused)
    ways: list[Callable[[nn.Module, Call], ModelGraph]] = [_symbolic, _exported]
    if type(model).forward is nn.Sequential.forward and not leaves:
        ways = [_sequential]
    failures: list[str] = []
    for way in ways:
        try:
            with untouched(model):
                graph = way(model, as_call(inputs))
                outcome = outcome_of(model, graph.run, inputs)
        except Exception as error:
            failures.append(f"{first_line(error)}{where(error)}")
            continue
        if (found := difference(reference, outcome)) is None:
            return replace(graph, recompute=_recompute(model, graph, inputs, habits.recomputes))
        failures.append(found)
    raise _untraceable(
        model,
        f"{'; then '.join(dict.fromkeys(failures))}. Build the model as nn.Sequential of blocks, "
        f"each of which is then one layer, or write the forward without it",
    )


def _untraceable(model: nn.Module, reasons: str | None) -> UntraceableModelError:
    return UntraceableModelError(
        f"the forward of {type(model).__name__} cannot be traced: {reasons}"
    )


def _recompute(model: nn.Module, graph: ModelGraph, inputs: Any, is_asked: bool) -> Recompute:
    if not is_asked:
        return "none"
    return "kept" if recomputes(model, graph.run, inputs) else "dropped"


class _Tracer(fx.Tracer):
    """Tracer that takes the arguments that a batch has, and leaves the others at their defaults."""

    proxy_buffer_attributes = True

    def __init__(self, call: Call, children_are_leaves: bool) -> None:
        super().__init__()
        self.call, self.children_are_leaves = call, children_are_leaves
        self.traced_keys: list[int | str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.children_are_leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = _positional_names(root_fn, len(self.call.args))
        args = [self._argument(k, names[k], v) for k, v in enumerate(self.call.args)]
        kwargs = {k: self._argument(k, k, v) for k, v in self.call.kwargs.items()}
        return partial(root_fn, **kwargs), [self.root, *args]

    def _argument(self, key: int | str, name: str, value: Any) -> Any:
        if not tensors_in(value):
            return value
        self.traced_keys.append(key)
        return self.create_proxy("placeholder", name, (), {})


def _positional_names(forward: Callable[..., Any], count: int) -> list[str]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return [names[k] if k < len(names) else f"input_{k}" for k in range(count)]


def _sequential(model: nn.Module, call: Call) -> ModelGraph:
    return _traced(model, call, True)


def _symbolic(model: nn.Module, call: Call) -> ModelGraph:
    found = _traced(model, call, False)
    try:
        with untouched(model):
            model.train(not model.training)
            mode_matters = _traced(model, call, False).module.code != found.module.code
    except Exception:  # what it does in its other mode cannot be written down
        mode_matters = True
    return replace(found, mode_matters=mode_matters)


def _traced(model: nn.Module, call: Call, children_are_leaves: bool) -> ModelGraph:
    tracer = _Tracer(call, children_are_leaves)
    try:
        # Tensors that the tracer finds in a forward become attributes.
        with untouched(model), _whole_functions(tracer):
            module = fx.GraphModule(model, tracer.trace(model))
    finally:
        del tracer.call  # a tracer refers to itself, and would hold the batch until collected
    return ModelGraph(module, tuple(tracer.traced_keys), _form(call), None, False)


@contextmanager
def _whole_functions(tracer: fx.Tracer) -> Iterator[None]:
    """Trace a ``torch.autograd.Function`` as one call, not through: its backward is its own."""
    known = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", _whole_function(kind), args, kwargs)
        return known(kind, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = classmethod(known)  # type: ignore[assignment]


def _whole_function(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """A function of our own: of torch's, code that fx writes expects to find them by name."""

    def function(*args: Any, **kwargs: Any) -> Any:
        apply: Callable[..., Any] = kind.apply  # not the one that is there while it is traced
        return apply(*args, **kwargs)

    function.__name__ = kind.__name__
    return function


def _exported(model: nn.Module, call: Call) -> ModelGraph:
    with _quiet():
        program = torch.export.export(model, call.args, call.kwargs)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return ModelGraph(module, None, _form(call), program.call_spec.out_spec, True)


def _form(call: Call) -> Value:
    return value_of("batch", tuple(call))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence logging: what export logs of a failure is in its error, too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def called(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for the inputs of a batch."""
    call = as_call(inputs)
    return model(*call.args, **call.kwargs)
