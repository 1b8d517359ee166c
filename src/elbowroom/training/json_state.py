"""State of optimizers and schedulers as JSON: also tuples, tensors and keys that are no texts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from elbowroom.core.errors import InputError

_TAG = "__kind__"


def to_json(value: Any) -> Any:
    """A JSON value for ``from_json``. Raises InputError for what a checkpoint cannot hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return {_TAG: "tensor", "dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [to_json(item) for item in value]}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        if kind == "dict" and all(isinstance(key, str) and key != _TAG for key in value):
            return {key: to_json(item) for key, item in value.items()}
        items = [[to_json(key), to_json(item)] for key, item in value.items()]
        return {_TAG: kind, "items": items}
    raise InputError(
        f"a checkpoint cannot hold a {type(value).__name__} of the optimizer or its scheduler: "
        f"leave it out of their state"
    )


def from_json(value: Any) -> Any:
    """What ``to_json`` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: from_json(item) for key, item in value.items()}
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"].removeprefix("torch."))
        return torch.tensor(value["values"], dtype=dtype)
    if kind == "tuple":
        return tuple(map(from_json, value["items"]))
    items = {_hashable(from_json(key)): from_json(item) for key, item in value["items"]}
    return Counter(items) if kind == "counter" else items


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
