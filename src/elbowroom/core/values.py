"""Checks of single values, as they come from JSON."""

from __future__ import annotations

from typing import Any

from elbowroom.core.errors import InputError, shown


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_whole(what: str, value: Any, most: int, least: int = 0) -> None:
    """Raise InputError unless a value is a whole number from ``least`` to ``most``."""
    if not is_whole(value) or not least <= value <= most:
        raise InputError(f"{what} is {shown(value)}: give a whole number from {least} to {most:g}")


def check_flag(what: str, value: Any) -> None:
    """Raise InputError unless a value is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{what} is {shown(value)}: give true or false")
