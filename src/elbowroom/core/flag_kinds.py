"""Kinds of values that flags take: each reads a text, or says to argparse what is wrong with it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from elbowroom.core.errors import InputError, shown
from elbowroom.core.options import Kind, out_of_range
from elbowroom.core.units import (
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_latency,
    parse_memory,
)

T = TypeVar("T")

_MOST_DIGITS = 100


def size(text: str) -> int:
    return int(_in_range("size", text, _parsed(parse_bytes, text)))


def memory(text: str) -> int:
    return int(_in_range("memory", text, _parsed(parse_memory, text)))


def bandwidth(text: str) -> float:
    return _parsed(parse_bandwidth, text)


def latency(text: str) -> float:
    return _parsed(parse_latency, text)


def flops(text: str) -> float:
    return _parsed(parse_flops, text)


def count(text: str) -> int:
    return int(_in_range("count", text, _whole(text)))


def number(text: str) -> int:
    return int(_in_range("number", text, _whole(text)))


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    return _in_range("seconds", text, seconds)


def auto(kind: Callable[[str], T]) -> Callable[[str], T | None]:
    """The kind, or the word "auto" for what the planner is to choose."""

    def read(text: str) -> T | None:
        return None if text == "auto" else kind(text)

    return read


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _whole(text: str) -> float:
    """The whole number that a text is; NaN for any other text, infinity for one without end."""
    if not text.isdecimal():
        return math.nan
    return int(text) if len(text) < _MOST_DIGITS else math.inf


def _in_range(kind: Kind, text: str, value: float) -> float:
    if (wanted := out_of_range(kind, value)) is not None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {wanted}")
    return value
