"""Recipes: the calls that wrote a saved storage, as data, so that its bytes can be made again.

A recipe reads saved storages, parameters and buffers, and what its own earlier calls made. It is
replayed instead of a copy back; what it says of seconds and bytes was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from elbowroom.core.errors import InputError

MOST_CALLS = 1000

SettingKind = Literal["dtype", "memory_format", "device"]
_KINDS = ("dtype", "memory_format", "device")


@dataclass(frozen=True)
class Made:
    """A storage that call ``call`` of the same recipe makes, as its tensor number ``output``."""

    call: int
    output: int


@dataclass(frozen=True)
class TensorArgument:
    """A tensor that a call takes: a view of a storage.

    Args:
        source: number of a saved storage, qualified name of a parameter or buffer, or what an
            earlier call made.
        dtype: as "float32".
        shape, stride: in elements.
        offset: of the first element in its storage, in elements.

    """

    source: int | str | Made
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        if isinstance(self.source, bool) or not isinstance(self.source, int | str | Made):
            raise InputError(f"a recipe reads {self.source!r}: give a storage, a name or a call")
        if not isinstance(self.dtype, str):
            raise InputError(f"a recipe reads a tensor of dtype {self.dtype!r}: give its name")
        numbers = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or not all(map(_is_count, numbers)):
            raise InputError(
                f"a recipe reads a tensor of shape {self.shape}, stride {self.stride} and offset "
                f"{self.offset}: give whole numbers from 0, one stride for each dim"
            )


@dataclass(frozen=True)
class Setting:
    """A constant of PyTorch's own, such as a dtype, by its kind and name."""

    kind: SettingKind
    name: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or not isinstance(self.name, str):
            raise InputError(f"a recipe has a {self.kind!r} {self.name!r}: give a {_KINDS}")


Argument: TypeAlias = (
    "bool | int | float | str | TensorArgument | Setting | tuple[Argument, ...] | None"
)


@dataclass(frozen=True)
class Call:
    """One call of a function of PyTorch's, such as "torch.nn.functional.gelu"."""

    function: str
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument] = field(default_factory=dict)

    def tensors(self) -> Iterator[TensorArgument]:
        """Tensors among the arguments, those in lists included."""
        waiting: list[Argument] = [*self.args, *self.kwargs.values()]
        while waiting:
            argument = waiting.pop()
            if isinstance(argument, TensorArgument):
                yield argument
            elif isinstance(argument, tuple):
                waiting += argument


@dataclass(frozen=True)
class Recipe:
    """How to make a saved storage again.

    Args:
        calls: in order.
        result: the storage, of all that the calls make.
        seconds: of a replay, with the checksums at the save and of the result, and without bringing
            what it reads.
        extra_bytes: most that a replay holds at a time beyond the storage itself.

    Raises InputError for calls that read what is not made yet.

    """

    calls: tuple[Call, ...]
    result: Made
    seconds: float
    extra_bytes: int

    def __post_init__(self) -> None:
        if not 0 < len(self.calls) <= MOST_CALLS:
            raise InputError(f"a recipe has {len(self.calls)} calls: give 1 to {MOST_CALLS}")
        for number, call in enumerate(self.calls):
            for tensor in call.tensors():
                _check_made(tensor.source, number)
        _check_made(self.result, len(self.calls))
        is_number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not is_number or not 0 <= self.seconds < math.inf or not _is_count(self.extra_bytes):
            raise InputError(
                f"a recipe takes {self.seconds!r} s and {self.extra_bytes!r} bytes: give numbers "
                "that are not negative"
            )

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Saved storages that it reads, ascending."""
        sources = {each.source for call in self.calls for each in call.tensors()}
        return tuple(sorted(source for source in sources if isinstance(source, int)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameters and buffers that it reads, sorted."""
        sources = {each.source for call in self.calls for each in call.tensors()}
        return tuple(sorted(source for source in sources if isinstance(source, str)))

    @staticmethod
    def from_json(data: Any) -> Recipe:
        """Build one from ``dataclasses.asdict``'s form, as JSON has it.

        Raises InputError, KeyError, TypeError or ValueError for what that never gives.
        """
        calls = tuple(
            Call(
                _text(call["function"]),
                tuple(_argument(each) for each in call["args"]),
                {_text(key): _argument(each) for key, each in call["kwargs"].items()},
            )
            for call in data["calls"]
        )
        result = Made(**data["result"])
        return Recipe(calls, result, data["seconds"], data["extra_bytes"])


def _argument(data: Any) -> Argument:
    if isinstance(data, dict):
        if "kind" in data:
            return Setting(**data)
        source = data["source"]
        source = Made(**source) if isinstance(source, dict) else source
        sizes = {key: tuple(data[key]) for key in ("shape", "stride")}
        return TensorArgument(**{**data, **sizes, "source": source})
    if isinstance(data, list | tuple):
        return tuple(_argument(each) for each in data)
    if isinstance(data, float) and not math.isfinite(data):
        raise InputError(f"a recipe has the constant {data}: only finite ones are replayed")
    if data is None or isinstance(data, bool | int | float | str):
        return data
    raise InputError(f"a recipe has the argument {data!r}, which no call takes")


def _check_made(source: Any, num_calls: int) -> None:
    """Raise InputError for a call's result that is not there after ``num_calls`` calls."""
    if not isinstance(source, Made):
        return
    if not _is_count(source.call) or not _is_count(source.output) or source.call >= num_calls:
        raise InputError(f"a recipe reads {source} after {num_calls} calls: list that call earlier")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"a recipe has the name {value!r}: give a text")
    return value
