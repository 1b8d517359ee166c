"""The pace of a pipe: a slope of what is steady."""

from __future__ import annotations

import pytest

from elbowroom.plans.pipeline_pace import steady_seconds


def test_start_up_does_not_count() -> None:
    steady = [(minibatch, 7.0 + 0.25 * minibatch) for minibatch in range(6, 18, 3)]
    assert steady_seconds([(0, 0.0), (3, 5.0), *steady]) == pytest.approx(0.25)


@pytest.mark.parametrize("updates", [[], [(0, 1.0)], [(0, 1.0), (1, 2.0)]])
def test_too_few(updates: list[tuple[int, float]]) -> None:
    assert steady_seconds(updates) is None
