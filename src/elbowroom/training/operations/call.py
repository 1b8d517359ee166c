"""Call of an operation with its arguments by name, however the model spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from elbowroom.core.layer_shapes import Kind
from elbowroom.core.windows import AxisWindow
from elbowroom.training.operations.operation import Settings, Stored

Shape = tuple[int, ...]


class NoRuleError(Exception):
    """An operation, or a use of one, that no rule describes."""


class Read(NamedTuple):
    """An argument that is another layer's output."""

    layer: str


@dataclass(frozen=True)
class Unknown:
    """An argument that is no constant, such as a number that is computed from sizes."""


UNKNOWN = Unknown()


@dataclass(frozen=True, eq=False)
class Found:
    """What a rule finds out of a call.

    ``features`` is None where they are those of the first source, or where the rule cannot know.
    """

    kind: Kind
    sources: tuple[str, ...]
    settings: Settings = None
    features: int | None = None
    windows: tuple[AxisWindow, ...] = ()
    parameters: Mapping[str, str] | None = None
    matrices: tuple[str, ...] = ("weight",)
    groups: int = 1
    order: tuple[int, ...] = ()
    flops: float = 0.0


class Tensor(NamedTuple):
    """Shape and dtype of a tensor, and which of its dimensions has the features."""

    shape: Shape
    dtype: torch.dtype
    features: int = 1


class Call:
    """Arguments of one call, each to be taken once; each way to take one raises NoRuleError.

    Args:
        values: ``Read``, ``Stored``, UNKNOWN, tuples of those, or constants, by name.
        out: what the call gives.
        tensors: outputs of the layers so far that are plain tensors, by layer.
        state: shapes of parameters and buffers, by name.

    """

    def __init__(
        self,
        values: Mapping[str, Any],
        out: Tensor,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, torch.Tensor],
    ) -> None:
        self.out, self.tensors, self.state = out, tensors, state
        self._values = dict(values)

    def raw(self, key: str, default: Any = None) -> Any:
        """An argument of any kind."""
        return self._values.pop(key, default)

    def constant(self, key: str, default: Any = None) -> Any:
        value = self.raw(key, default)
        if not is_constant(value):
            raise NoRuleError(f"{key} is no constant")
        return value

    def source(self, key: str = "input") -> str:
        """The name of the layer whose output an argument is."""
        value = self.raw(key)
        if not isinstance(value, Read):
            raise NoRuleError(f"{key} is no layer's output")
        return value.layer

    def stored(self, key: str) -> str | None:
        """The name of the parameter or buffer that an argument is; None for none."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Stored):
            raise NoRuleError(f"{key} is no parameter")
        return value.name

    def needs(self, key: str) -> str:
        if (name := self.stored(key)) is None:
            raise NoRuleError(f"there is no {key}")
        return name

    def roles(self, *keys: str) -> dict[str, str]:
        """Names of the parameters and buffers that there are, by role."""
        found = {key: self.stored(key) for key in keys}
        return {key: name for key, name in found.items() if name is not None}

    def each(self, key: str, count: int, default: Any = None) -> tuple[int, ...]:
        """Whole numbers, one for each of ``count`` dimensions; a single one stands for all."""
        value = self.constant(key, default)
        values = (value,) if isinstance(value, int) else tuple(value)
        if not all(isinstance(each, int) for each in values) or len(values) not in (1, count):
            raise NoRuleError(f"{key} is {value}")
        return values * count if len(values) == 1 else values

    def tensor(self, layer: str) -> Tensor:
        return self.tensors[layer]

    def must_be(self, is_so: bool, what: str) -> None:
        if not is_so:
            raise NoRuleError(what)

    def finish(self) -> None:
        """Raise NoRuleError if an argument that means something was not taken."""
        left = [key for key, value in self._values.items() if value is not None]
        if left:
            raise NoRuleError(f"no rule for {left[0]}")


def is_constant(value: Any) -> bool:
    if isinstance(value, Read | Stored):
        return False
    if isinstance(value, tuple | list):
        return all(is_constant(each) for each in value)
    return not isinstance(value, Unknown | torch.Tensor | dict | slice)
