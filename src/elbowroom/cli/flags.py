"""Flags made of options, and the flag that every planning command has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from elbowroom.app.machine import THIS_MACHINE
from elbowroom.core.cluster_file import PRESET_NAMES
from elbowroom.core.flag_kinds import auto, count, memory, number, seconds, size
from elbowroom.core.options import Option, flag_of, names_of, options_of


def add_cluster(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cluster",
        default=THIS_MACHINE,
        help=f"{PRESET_NAMES}; a TOML file; or {THIS_MACHINE} (default)",
    )


KINDS: dict[str, Callable[[str], Any]] = {
    **{"text": str, "names": str, "path": Path},
    **{"number": number, "count": count, "size": size, "memory": memory, "seconds": seconds},
}


METAVARS = {"count": "N", "number": "N", "size": "SIZE", "memory": "SIZE", "seconds": "SECONDS"}


def add_options(
    parser: argparse.ArgumentParser, settings: type, groups: Collection[str] | None = None
) -> None:
    """Add a flag for every option of a dataclass, or for those of some groups."""
    made: dict[str, argparse._ArgumentGroup] = {}
    for each, option in options_of(settings):
        if groups is not None and option.group not in groups:
            continue
        if option.group not in made:
            made[option.group] = parser.add_argument_group(option.group)
        made[option.group].add_argument(flag_of(each), dest=each.name, **_how(option, each.default))


def _how(option: Option, default: Any) -> dict[str, Any]:
    """Arguments of ``add_argument``."""
    if option.kind == "switch":
        return {"action": "store_false" if default else "store_true", "help": option.help}
    metavar = option.metavar or METAVARS.get(option.kind)
    how: dict[str, Any] = {"help": option.help, "default": default, "metavar": metavar}
    if option.kind == "names":
        return {**how, "action": "append", "default": []}
    if option.choices:
        how |= (
            {"choices": ("auto", *option.choices), "default": "auto"}
            if option.is_planned
            else {"choices": option.choices}
        )
    else:
        kind = KINDS[option.kind]
        how["type"] = auto(kind) if option.is_planned else kind
    if "default" not in option.help:
        unset = "as planned" if option.is_planned else "none"
        how["help"] += f" (default: {unset})" if default is None else " (default %(default)s)"
    return how


def settings_of(
    args: argparse.Namespace, settings: type, groups: Collection[str] | None = None
) -> dict[str, Any]:
    """The fields that ``add_options`` added flags for."""
    found = {}
    for each, option in options_of(settings):
        if groups is None or option.group in groups:
            value = getattr(args, each.name)
            if option.kind == "names":
                value = names_of(each, value)
            found[each.name] = None if option.is_planned and value == "auto" else value
    return found
