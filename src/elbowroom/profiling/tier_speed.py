"""Bandwidth of a slow tier in a folder, measured by writing and reading it."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from elbowroom.core.units import MIB
from elbowroom.swap.tier import FileTier, Slot

_BLOCK_BYTES = 8 * MIB
_NUM_BLOCKS = 8
_NUM_ROUNDS = 3


class TierSpeed(NamedTuple):
    """Bytes per second to a tier and back."""

    out_bandwidth: float
    in_bandwidth: float


def tier_speed(folder: Path | None) -> TierSpeed:
    """Write and read blocks of 8 MiB; the medians of their speeds.

    ``folder`` is None for temporary files' own. Raises InputError for a folder that cannot be used,
    TierFullError if there is no room for eight blocks.
    """
    tier = FileTier(folder)
    memory = mmap.mmap(-1, _BLOCK_BYTES)
    memory.write(bytes(_BLOCK_BYTES))  # pages are there before the first is timed
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        slots = [tier.take(_BLOCK_BYTES) for _ in range(_NUM_BLOCKS)]
        for slot in slots:
            tier.write(slot, address, _BLOCK_BYTES)  # the file has its size
        writes = _seconds(tier.write, slots * _NUM_ROUNDS, address)
        reads = _seconds(tier.read, slots * _NUM_ROUNDS, address)
    finally:
        tier.close()
    return TierSpeed(_BLOCK_BYTES / writes, _BLOCK_BYTES / reads)


def _seconds(copy: Callable[[Slot, int, int], None], slots: Sequence[Slot], address: int) -> float:
    """Median seconds of one copy."""
    seconds = []
    for slot in slots:
        begin = time.perf_counter()
        copy(slot, address, _BLOCK_BYTES)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)
