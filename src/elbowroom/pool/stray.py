"""Tensors that a module computes with and has not registered: a pool cannot move them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_DEPTH = 4


def stray_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors within reach of a module's attributes that are neither parameters nor buffers.

    Looks into containers, closures, bound methods and plain objects, some steps deep, and not into
    other modules.
    """
    registered = {id(t) for part in module.modules() for t in (*part.parameters(), *part.buffers())}
    seen: set[int] = set()
    for path, part in module.named_modules():
        own = {
            k: v for k, v in vars(part).items() if k not in ("_parameters", "_buffers", "_modules")
        }
        for name, tensor in _within(own, path or type(part).__name__, _DEPTH, seen):
            if id(tensor) not in registered:
                yield name, tensor


def _within(
    value: Any, name: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    for key, part in _parts(value):
        yield from _within(part, f"{name}.{key}", depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, nn.Module | type | str | bytes | int | float | None):
        return
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    elif isinstance(value, partial):
        yield from enumerate((value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, FunctionType):
        yield from enumerate(_closure(value))
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from vars(value).items()


def _closure(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet filled
            continue
