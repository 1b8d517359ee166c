"""The simple planner keeps what it can, and refuses what cannot fit by numbers."""

from __future__ import annotations

import pytest

from elbowroom.core.errors import MemoryPlanError
from elbowroom.planning.swap.choose import plan_swap
from tests.planning.swap.profiles import two_storages


@pytest.mark.parametrize(("budget", "swapped"), [(1160, [0]), (1169, [0]), (1170, [])])
def test_the_shortest_gaps_are_kept(budget: int, swapped: list[int]) -> None:
    plan = plan_swap(two_storages(), budget)
    assert [choice.storage for choice in plan.choices] == swapped
    assert plan.peak_bytes <= budget
    assert plan.out_bytes == plan.in_bytes == 100 * len(swapped)
    assert plan.compute_seconds == pytest.approx(1.1)


def test_one_byte_below_the_floor_is_refused_by_numbers() -> None:
    with pytest.raises(MemoryPlanError, match=r"1160 bytes.*\(1159\)"):
        plan_swap(two_storages(), 1159)
