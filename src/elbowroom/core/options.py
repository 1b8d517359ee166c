"""Settings that users give: declared once, as fields that know their kind and their help.

The command line makes flags of them (``cli.flags``), and Python's functions read their arguments by
them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from elbowroom.core.errors import InputError, shown
from elbowroom.core.units import MIB, parse_bytes, parse_memory

Kind = Literal["text", "names", "switch", "number", "count", "size", "memory", "seconds", "path"]
"""``names`` are several texts, a ``number`` is whole, ``count`` and sizes (in bytes) start at 1.

``memory`` is a size that is no small number without a unit.
"""

RANGES: dict[Kind, tuple[int, int]] = {
    "number": (0, 2**32 - 1),  # the seeds of NumPy
    "count": (1, 2**31 - 1),
    "size": (1, 2**60),
    "memory": (1, 2**60),
    "seconds": (0, 10**9),
}
"""Least and most of each kind of number: far more than any use has, and no overflow anywhere."""

_KEY = "option"
_PARSERS: dict[Kind, Callable[[str], int]] = {"size": parse_bytes, "memory": parse_memory}


@dataclass(frozen=True)
class Option:
    """A setting as users see it.

    ``flag`` is its name on the command line where that is not the field's. With ``is_planned``,
    None and the word "auto" leave the choice to the planner.
    """

    kind: Kind
    help: str
    group: str
    choices: tuple[str, ...] = ()
    flag: str | None = None
    metavar: str | None = None
    is_planned: bool = False


def option(default: Any, kind: Kind, help: str, group: str, **others: Any) -> Any:
    """A field of a dataclass that is an option. ``others`` are fields of ``Option``."""
    return field(default=default, metadata={_KEY: Option(kind, help, group, **others)})


def options_of(settings: type) -> Iterator[tuple[Field[Any], Option]]:
    """The fields of a dataclass that are options."""
    for each in fields(settings):
        if _KEY in each.metadata:
            yield each, each.metadata[_KEY]


def read_options(settings: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as Python's users give them, by the names of fields or flags, made into the fields'.

    "auto" becomes None, a size such as "2GiB" bytes, a path a Path, and one name a tuple of one.
    Raises InputError for what an option cannot be, and for an option by two names.
    """
    known = option_names(settings)
    by_field: dict[str, str] = {}
    for name in given:
        other = by_field.setdefault(known[name].name, name)
        if other != name:
            raise InputError(f"{other} and {name} are two names of one option: give one")
    return {known[name].name: _read(name, known[name], value) for name, value in given.items()}


def option_names(settings: type) -> dict[str, Field[Any]]:
    """The options of a dataclass by their names in Python: those of fields, and those of flags."""
    found = {}
    for each, option in options_of(settings):
        found[each.name] = each
        if option.kind != "switch":
            found[flag_of(each).removeprefix("--").replace("-", "_")] = each
    return found


def _read(name: str, each: Field[Any], value: Any) -> Any:
    option: Option = each.metadata[_KEY]
    if option.is_planned and value == "auto":
        return None
    if option.kind == "memory" and type(value) is int and 1 <= value < MIB:
        value = str(value)  # without a unit
    if option.kind in _PARSERS and isinstance(value, str):
        try:
            value = _PARSERS[option.kind](value)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if option.kind == "path" and isinstance(value, str | os.PathLike):
        value = Path(value)
    if option.kind == "names" and isinstance(value, str):
        value = (value,)
    if option.kind == "names" and isinstance(value, list | tuple | set | frozenset):
        value = names_of(each, value)
    if value is None and each.default is None:
        return None
    if wrong := _what_is_wrong(option, value):
        raise InputError(f"{name}={shown(value)}: give {wrong}")
    return value


def names_of(each: Field[Any], names: Iterable[Any]) -> Any:
    """Names as their field keeps them: a tuple, or a set where their order means nothing."""
    return tuple(names) if isinstance(each.default, tuple) else frozenset(names)


def out_of_range(kind: Kind, value: float) -> str | None:
    """What a number should be instead, or None for one that is in the range of its kind."""
    least, most = RANGES[kind]
    if least <= value <= most:
        return None
    unit = "number of seconds" if kind == "seconds" else "whole number"
    return f"a {unit} from {least} to {most}"


def _what_is_wrong(option: Option, value: Any) -> str | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    match option.kind:
        case "text" if option.choices:
            is_good, wanted = value in option.choices, " or ".join(map(repr, option.choices))
        case "text":
            is_good, wanted = isinstance(value, str), "a text"
        case "names":
            is_good = isinstance(value, tuple | frozenset) and all(
                isinstance(name, str) for name in value
            )
            wanted = "a list of texts"
        case "switch":
            is_good, wanted = isinstance(value, bool), "True or False"
        case "path":
            is_good, wanted = isinstance(value, Path), "a path"
        case kind:
            is_number = is_whole or (kind == "seconds" and isinstance(value, float))
            return out_of_range(kind, value if is_number else math.nan)
    return None if is_good else wanted


def flag_of(each: Field[Any]) -> str:
    """The name of an option on the command line."""
    found: Option = each.metadata[_KEY]
    return found.flag or f"--{each.name.replace('_', '-')}"
