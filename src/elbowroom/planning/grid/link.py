"""Seconds of collective communication, as the paper counts them (1712.04432, section 2).

A message costs a latency, and its bytes over the bandwidth. ``count`` workers reach each other in
ceil(log2 count) latencies.
"""

from __future__ import annotations

import numpy as np

from elbowroom.planning.grid.settings import GridLink
from elbowroom.planning.grid.strategies import Floats


def doublings(count: Floats) -> Floats:
    """Rounds in which ``count`` workers reach each other."""
    return np.asarray(np.ceil(np.log2(np.maximum(count, 1))))


def gather_seconds(link: GridLink, count: Floats, num_bytes: Floats) -> Floats:
    """Each of ``count`` workers gets the whole, ``num_bytes``, of which it has its part."""
    latency = link.latency_seconds * doublings(count)
    return latency + num_bytes / link.bandwidth * (count - 1) / count


def sum_seconds(link: GridLink, count: Floats, num_bytes: Floats) -> Floats:
    """Each of ``count`` workers gets the sum of ``num_bytes`` of each: an all-reduce."""
    return np.where(count > 1, 2 * gather_seconds(link, count, num_bytes), 0.0)
