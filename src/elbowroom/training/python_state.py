"""What Python keeps for a model beside parameters and buffers: state that a graph does not see.

Counters on modules, in dicts, lists and objects on them, in closures, classes and globals of the
user's own code, generators of random numbers of the model's own. A pipeline does not have such
state: stages are other processes, replicas see other minibatches, checkpoints do not hold it.
"""

from __future__ import annotations

import itertools
import operator
import random
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import nn

from elbowroom.training.user_code import is_own

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), Enum),
    *(np.generic, Fraction, Decimal),
)
_DEPTH, _MOST_ITEMS, _MOST_BYTES, _MOST_VALUES = 8, 1000, 1 << 20, 50_000
_MOST_SUMMED_BYTES = 1 << 26
"""Arrays up to ``_MOST_BYTES`` are kept and put back, up to this their sums are compared."""

_TENSORS = {"_parameters", "_buffers", "_modules"}


class _Version(NamedTuple):
    """A tensor, and how often it was written into."""

    tensor: int
    version: int


class PythonState:
    """Values that a model's forward, and functions, can reach, by name, as they are now."""

    def __init__(self, model: nn.Module, *functions: Callable[..., Any]) -> None:
        self.values: dict[str, object] = {}
        self._model, self._functions = model, functions
        self._seen: dict[int, object] = {}  # keeps them alive, so that no other has their id
        self._undo: list[Callable[[], object]] = []
        for module in model.modules():
            self._seen[id(module)] = module
        for one in (*model.parameters(), *model.buffers()):
            self._seen[id(one)] = one
        for name, module in model.named_modules():
            self._module(name, module, 0)
        for function in functions:
            self._visit("function", function, 0)

    def put_back(self) -> None:
        """Give all that was reached the values that it had."""
        for undo in self._undo:
            undo()

    def changed(self) -> list[str]:
        """Names of what has other values now. What only keeps other tensors is not among them."""
        now = PythonState(self._model, *self._functions).values
        return [name for name, value in now.items() if self._is_other(name, value)]

    def _is_other(self, name: str, value: Any) -> bool:
        old: Any = self.values.get(name)
        if isinstance(value, _Version):
            is_same = isinstance(old, _Version) and old.tensor == value.tensor
            return is_same and old != value
        return bool(value != old and not (value != value and old != old))  # NaN is like NaN

    def _module(self, name: str, module: nn.Module, depth: int) -> None:
        children = module._modules
        self.values[_joined(name, "children")] = [(k, id(m)) for k, m in children.items()]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                self.values[_joined(name, f"{key}.requires_grad")] = parameter.requires_grad
        self._undo += [partial(_refill, one, dict(one)) for one in (vars(module), children)]
        for key, value in list(vars(module).items()):
            if key not in _TENSORS:
                self._visit(_joined(name, key), value, depth + 1)
        self._class(type(module), depth + 1)

    def _visit(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, _PLAIN):
            self.values[name] = value
        elif id(value) in self._seen or depth > _DEPTH or len(self.values) > _MOST_VALUES:
            return
        else:
            self._seen[id(value)] = value
            if not self._leaf(name, value) and not self._container(name, value, depth):
                self._code(name, value, depth)

    def _leaf(self, name: str, value: Any) -> bool:
        """Note what changes as a whole; whether it is of such a kind."""
        if isinstance(value, torch.Tensor) and value.is_inference():
            return True  # nobody may write into it
        if isinstance(value, torch.Tensor):
            self.values[name] = _Version(id(value), value._version)
            if value.nbytes <= _MOST_BYTES and value.layout is torch.strided:
                self._undo.append(partial(write_back, value, value.detach().clone()))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
                self.values[name] = value.tobytes()
                if value.flags.writeable:
                    self._undo.append(partial(np.copyto, value, value.copy()))
            elif value.nbytes <= _MOST_SUMMED_BYTES and not value.dtype.hasobject:
                self.values[name] = crc32(np.ascontiguousarray(value).data)
        elif isinstance(value, array):
            self.values[name] = value.tobytes()
        elif isinstance(value, random.Random):
            self._generator(name, value.getstate(), value.setstate)
        elif isinstance(value, np.random.RandomState):
            self._generator(name, value.get_state(), value.set_state)
        elif isinstance(value, np.random.Generator):
            put = partial(setattr, value.bit_generator, "state")
            self._generator(name, value.bit_generator.state, put)
        elif isinstance(value, torch.Generator):
            self._generator(name, value.get_state(), value.set_state)
        elif isinstance(value, GeneratorType):
            self.values[name] = repr(value.gi_frame and value.gi_frame.f_locals)
        elif isinstance(value, itertools.count):
            self.values[name] = repr(value)
        elif isinstance(value, Iterator):
            left = operator.length_hint(value, -1)
            self.values[name] = left if left >= 0 else object()  # who knows: it counts as changed
        elif isinstance(value, ContextVar):
            self.values[name] = repr(value.get(None))
        else:
            return False
        return True

    def _generator(self, name: str, state: Any, put: Callable[[Any], object]) -> None:
        tensor = isinstance(state, torch.Tensor)
        self.values[name] = state.numpy().tobytes() if tensor else repr(state)
        self._undo.append(partial(put, state))

    def _container(self, name: str, value: Any, depth: int) -> bool:
        """Visit what is in a container or an object; whether it is one."""
        if isinstance(value, dict):
            items = list(value.items())[:_MOST_ITEMS]
            if len(value) <= _MOST_ITEMS:
                self._undo.append(partial(_refill, value, dict(value)))
        elif isinstance(value, list | tuple | deque):
            items = list(enumerate(value))[:_MOST_ITEMS]
            if not isinstance(value, tuple):
                self.values[f"{name}'s length"] = len(value)
            if not isinstance(value, tuple) and len(value) <= _MOST_ITEMS:
                self._undo.append(partial(_refill_list, value, list(value)))
        elif isinstance(value, set):
            self.values[f"{name}'s length"] = len(value)
            self._undo += [value.clear, partial(value.update, set(value))]
            return True
        elif isinstance(value, nn.Module):
            self._module(name, value, depth)
            return True
        elif _is_own_class(type(value)) or isinstance(value, SimpleNamespace | threading.local):
            for key, kept in _attributes(value).items():
                self._visit(_joined(name, key), kept, depth + 1)
                put = setattr if isinstance(value, threading.local) else object.__setattr__
                self._undo.append(partial(put, value, key, kept))  # also of what is frozen
            self._class(type(value), depth + 1)
            return True
        else:
            return False
        for key, kept in items:
            self._visit(f"{name}[{key!r}]", kept, depth + 1)
        return True

    def _code(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, partial):
            for part in (value.func, value.args, value.keywords):
                self._visit(name, part, depth + 1)
        elif isinstance(value, MethodType):
            self._visit(name, value.__self__, depth + 1)
            self._visit(name, value.__func__, depth + 1)
        elif isinstance(value, FunctionType):
            self._function(value, depth)
        elif isinstance(value, staticmethod | classmethod):
            self._visit(name, value.__func__, depth + 1)
        elif isinstance(value, property):
            self._visit(name, value.fget, depth + 1)
        elif isinstance(value, type):
            self._class(value, depth)
        elif hasattr(value, "__wrapped__"):
            self._visit(name, value.__wrapped__, depth + 1)

    def _function(self, function: FunctionType, depth: int) -> None:
        """Visit the globals and closures that the user's own code names."""
        if not _is_own_file(function.__code__.co_filename):
            return
        kept = (function.__defaults__, function.__kwdefaults__, vars(function))
        for part in kept:
            self._visit(function.__name__, part, depth + 1)
        names = set(_names(function.__code__))
        self._named(function.__globals__, names, depth)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with_value = cell != type(cell)()
            if with_value:
                self._visit(f"{function.__name__}.{name}", cell.cell_contents, depth + 1)
                self._undo.append(partial(setattr, cell, "cell_contents", cell.cell_contents))

    def _named(self, variables: dict[str, Any], names: set[str], depth: int) -> None:
        for name in sorted(names & variables.keys()):
            value = variables[name]
            if isinstance(value, ModuleType):
                if _is_own_file(getattr(value, "__file__", None) or "") and depth <= _DEPTH:
                    self._named(vars(value), names, depth + 1)
                continue
            self._visit(f"{name} (global)", value, depth + 1)
            self._undo.append(partial(variables.__setitem__, name, value))

    def _class(self, kind: type, depth: int) -> None:
        for one in kind.__mro__:
            if id(one) in self._seen or not _is_own_class(one):
                continue
            self._seen[id(one)] = one
            for key, value in list(vars(one).items()):
                if not key.startswith("__") or isinstance(value, FunctionType):
                    self._visit(f"{one.__name__}.{key}", value, depth + 1)
                    if isinstance(value, _PLAIN):
                        self._undo.append(partial(setattr, one, key, value))


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def write_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor the values that it had; of a dimension that is expanded, the one it has."""
    with torch.no_grad():
        if tensor.layout is torch.strided and 0 in tensor.stride():
            once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
            tensor, value = tensor[once], value[once]
        tensor.copy_(value)


def _refill(kept: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    kept.clear()
    kept.update(values)


def _refill_list(kept: list[Any] | deque[Any], values: list[Any]) -> None:
    kept.clear()
    kept.extend(values)


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return found | getattr(value, "__dict__", {})


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_own_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return _is_own_file(getattr(module, "__file__", None) or "")


@cache
def _is_own_file(path: str) -> bool:
    return bool(path) and is_own(Path(path))
