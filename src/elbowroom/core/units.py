"""Sizes and bandwidths with units, read and printed in one way everywhere."""

from __future__ import annotations

import re

from elbowroom.core.errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "ms": 1e-3, "s": 1.0}
_FLOPS = {"": 1.0, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BITS_PER_SECOND = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}


def parse_bytes(text: str) -> int:
    """Parse a size such as ``2GiB``, ``512MiB``, ``141GB`` or ``1000000`` into bytes.

    Raises InputError for anything else, with the accepted forms.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InputError(f"'{text}' is not a size: write for example 2GiB, 512MiB or 141GB")
    return int(float(match.group(1)) * factor)


def parse_memory(text: str) -> int:
    """``parse_bytes`` for memory, where a bare small number was meant in a larger unit.

    Raises InputError for it, too.
    """
    num_bytes = parse_bytes(text)
    if 0 < num_bytes < MIB and text.strip()[-1].isdigit():
        raise InputError(f"{num_bytes} bytes? write {text.strip()}MiB, or {text.strip()}B")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """Format a size for people, in binary units: ``1.41 GiB``, ``67.6 MiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            number = num_bytes / size
            return f"{number:.4g} {unit}" if abs(number) < 9999.5 else f"{number:.0f} {unit}"
    return f"{num_bytes} B"


def format_count(number: int) -> str:
    """Format a large number for people, as models are named: ``30.53B``, ``1.5M``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def parse_bandwidth(text: str) -> float:
    """Parse a rate such as ``10Gbit/s``, ``1.25GB/s`` or ``800MiB/s`` into bytes per second.

    Raises InputError for anything else, with the accepted forms.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]{1,5})/s\s*", text)
    unit = match.group(2).lower() if match else ""
    factor = _BITS_PER_SECOND.get(unit, 8 * _FACTORS.get(unit, 0))
    if match is None or not factor or not float(match.group(1)):
        raise InputError(f"'{text}' is not a bandwidth: write for example 10Gbit/s or 1.25GB/s")
    return float(match.group(1)) * factor / 8


def format_bandwidth(bytes_per_second: float) -> str:
    """Format a rate for people, in bits as networks are sold: ``10 Gbit/s``."""
    for unit, size in (("Gbit/s", 10**9), ("Mbit/s", 10**6), ("kbit/s", 10**3)):
        if bytes_per_second * 8 >= size:
            return f"{bytes_per_second * 8 / size:.4g} {unit}"
    return f"{bytes_per_second * 8:.4g} bit/s"


def parse_latency(text: str) -> float:
    """Parse a time such as ``2us``, ``0.5ms`` or ``0s`` into seconds.

    Raises InputError for anything else, with the accepted forms.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z\u00b5]{1,2})\s*", text)
    factor = _SECONDS.get(match.group(2)) if match else None
    if match is None or factor is None:
        raise InputError(f"'{text}' is not a latency: write for example 2us or 0.5ms")
    return float(match.group(1)) * factor


def parse_flops(text: str) -> float:
    """Parse a rate such as ``2.9TFLOP/s``, ``500 GFLOP/s`` or ``2.9T`` into FLOP per second.

    Raises InputError for anything else, with the accepted forms.
    """
    match = re.fullmatch(
        r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([mgtp]?)(flops?(/s)?)?\s*", text, re.IGNORECASE
    )
    if match is None or not float(match.group(1)):
        raise InputError(f"'{text}' is not a rate of work: write for example 2.9TFLOP/s")
    return float(match.group(1)) * _FLOPS[match.group(2).lower()]


def format_flops(flops_per_second: float) -> str:
    """Format a rate of work for people: ``2.9 TFLOP/s``."""
    for unit in ("p", "t", "g", "m"):
        if flops_per_second >= _FLOPS[unit]:
            return f"{flops_per_second / _FLOPS[unit]:.4g} {unit.upper()}FLOP/s"
    return f"{flops_per_second:.4g} FLOP/s"
