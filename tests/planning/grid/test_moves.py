"""What moves between two layouts: the closed form against boxes that are intersected one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from elbowroom.planning.grid.moves import move_seconds
from elbowroom.planning.grid.settings import GridLink
from elbowroom.plans.grid_layout import move_between, whole

BYTES_ONLY = GridLink(0.0, 1.0)
LATENCY_ONLY = GridLink(1.0, float("inf"))
SHAPE = (8, 8, 8)
"""Batch, space and features: as many as there are workers, so that all parts are even."""


def layouts(procs: int) -> list[tuple[int, ...]]:
    powers = [1 << k for k in range(procs.bit_length())]
    return [parts for parts in product(powers, repeat=3) if procs % np.prod(parts) == 0]


def moved(link: GridLink, procs: int, source: tuple[int, ...], target: tuple[int, ...]) -> float:
    def arrays(parts: tuple[int, ...]) -> list[np.ndarray]:
        return [np.array([[float(part)]]) for part in parts]

    found = move_seconds(link, procs, float(np.prod(SHAPE)), arrays(source), arrays(target))
    return float(found[0, 0])


@pytest.mark.parametrize("procs", [2, 4, 8])
def test_bytes_of_all_pairs_are_those_of_the_boxes(procs: int) -> None:
    for source, target in product(layouts(procs), repeat=2):
        start = whole(range(procs), 3).allotted(source)
        sent = move_between(start, start.allotted(target), SHAPE).sent
        closed = procs * moved(BYTES_ONLY, procs, source, target)
        assert closed == pytest.approx(sent.elements), (source, target)


def test_a_gather_takes_as_many_rounds_as_doublings() -> None:
    assert moved(LATENCY_ONLY, 8, (8, 1, 1), (1, 1, 1)) == 3
    assert moved(LATENCY_ONLY, 8, (8, 1, 1), (8, 1, 1)) == 0
    assert moved(LATENCY_ONLY, 8, (1, 1, 1), (8, 1, 1)) == 0  # each has its part
    assert moved(LATENCY_ONLY, 8, (8, 1, 1), (1, 1, 8)) == 7  # from each of the others
