"""The bounds of a search: how many cuts, and how minibatches in flight are counted."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.planning.pipeline.cuts import find_cuts
from elbowroom.planning.pipeline.partition import max_cuts
from elbowroom.planning.pipeline.stage_cost import StageCost
from elbowroom.plans.pipeline import Level, PipelineOptions
from tests.planning.pipeline.pipelines import chain

FREE, LIMITED = PipelineOptions(), PipelineOptions(memory_limit_bytes=10**9)


@pytest.mark.parametrize(
    ("sizes", "options", "most"),
    [
        ((1,), FREE, 1400),
        ((64,), FREE, 1386),
        ((64,), LIMITED, 1386),
        ((64,), PipelineOptions(straight=True), 1400),
        ((8, 8), FREE, 436),
        ((8, 8), LIMITED, 132),
        ((32, 32), LIMITED, 22),
    ],
)
def test_more_workers_leave_fewer_cuts(
    sizes: tuple[int, ...], options: PipelineOptions, most: int
) -> None:
    levels = tuple(Level(size, 1e9) for size in sizes)
    assert max_cuts(levels, options) == most


whole = st.integers(1, 9)


@given(whole, whole, whole, st.integers(0, 9), whole, st.integers(0, 9), st.integers(0, 9))
def test_rounding_at_each_level_is_rounding_once(
    inner: int, middle: int, m0: int, n0: int, m1: int, n1: int, n2: int
) -> None:
    """A stage of m0 workers in a unit of a group of m1 units, with n workers and units behind."""
    levels = (Level(inner, 1e9), Level(middle, 1e9), Level(9, 1e9))
    cost = StageCost(find_cuts(chain([(1.0, 1, 1)]), 8), levels, FREE)
    outermost = cost.unit_behind(2, 0, 3, n2)
    middlemost = cost.unit_behind(1, outermost, m1, n1)
    behind = n2 * inner * middle + 3 * n1 * inner + 3 * m1 * n0
    assert cost.unit_behind(0, middlemost, m0, n0) == ceil(behind / (3 * m1 * m0))
