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
