"""Sizes with units, read and printed in one way everywhere."""

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


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``2GiB``, ``512MiB``, ``141GB`` or ``1000000``.

    Raises InputError for anything else, with the accepted forms.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InputError(f"'{text}' is not a size: write for example 2GiB, 512MiB or 141GB")
    return int(float(match.group(1)) * factor)


def format_bytes(num_bytes: int) -> str:
    """A size for people, in binary units: ``1.41 GiB``, ``67.6 MiB``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            number = num_bytes / size
            return f"{number:.4g} {unit}" if abs(number) < 9999.5 else f"{number:.0f} {unit}"
    return f"{num_bytes} B"
