"""Modes are chosen by the plan's threshold and what was measured, and do not flap."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.pool.choice import HYSTERESIS, LEAST_ITERATIONS, MOST_CORRECTION, Chooser


def switches(modes: list[str]) -> list[int]:
    return [at for at in range(1, len(modes)) if modes[at] != modes[at - 1]]


@pytest.mark.parametrize("swing", [0.05, 0.5, 2.0])
def test_a_batch_that_swings_around_the_threshold(swing: float) -> None:
    """At most one switch in 20 iterations, and none within the hysteresis."""
    chance = random.Random(1)
    chooser = Chooser(threshold_rows=32, most_rows=256)
    modes = [chooser.choose(round(32 * (1 + swing) ** chance.uniform(-1, 1))) for _ in range(2000)]
    at = switches(modes)
    assert all(later - earlier >= LEAST_ITERATIONS for earlier, later in pairwise(at))
    assert bool(at) == (1 + swing > HYSTERESIS)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=300), st.integers(0, 500))
def test_switches_of_any_batches(batches: list[int], threshold: int) -> None:
    """A batch beyond the buffer streams at once; all other switches keep their distance."""
    chooser = Chooser(threshold, most_rows=200)
    modes = [chooser.choose(rows) for rows in batches]
    assert all(mode == "streamed" for mode, rows in zip(modes, batches, strict=True) if rows > 200)
    last = 0
    for at in switches(modes):
        assert at - last >= LEAST_ITERATIONS or batches[at] > 200
        last = at
    if threshold == 0:
        assert set(modes) == {"streamed"}


def test_a_tail_ships_and_a_new_load_streams() -> None:
    chooser = Chooser(threshold_rows=32, most_rows=256)
    modes = [chooser.choose(rows) for rows in [200] * 30 + [4] * 30 + [100] * 30]
    assert modes == ["streamed"] * 30 + ["shipped"] * 30 + ["streamed"] * 30


def test_what_is_measured_moves_the_threshold() -> None:
    """Streaming that waits 60 ms is worth 12 shipped rows of 5 ms, 120 of 0.5 ms."""
    for row_seconds, higher in ((5e-3, False), (0.5e-3, True)):
        chooser = Chooser(threshold_rows=40, most_rows=256)
        for _ in range(200):
            chooser.choose(40)
            chooser.streamed(60e-3)
            chooser.shipped(8, 8 * row_seconds)
        assert (chooser.threshold_rows > 40) == higher
        assert 40 / MOST_CORRECTION <= chooser.threshold_rows <= 40 * MOST_CORRECTION


def test_nothing_measured_leaves_the_plan() -> None:
    chooser = Chooser(threshold_rows=40, most_rows=256)
    chooser.streamed(0.0)
    chooser.shipped(4, -1.0)
    assert chooser.threshold_rows == 40
