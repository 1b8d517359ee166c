"""Swap plans round-trip, and plans that could not be carried out are refused when read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.plans.swap import (
    PlannedStorage,
    Swapped,
    SwapPlan,
    Transfer,
    default_order,
    read_swap_plan,
    write_swap_plan,
)

STORAGES = (
    PlannedStorage(100, (0, 2), 9),
    PlannedStorage(60, (1,), 8),
    PlannedStorage(30, (3,), None),
)
CHOICES = (Swapped(0, 4, 8), Swapped(1, 1, 8), Swapped(2, 5, None))


def plan(**changes: Any) -> SwapPlan:
    made = SwapPlan(
        num_ticks=12,
        smallest_bytes=10,
        storages=STORAGES,
        choices=CHOICES,
        transfers=default_order(STORAGES, CHOICES),
        budget_bytes=1000,
        static_bytes=500,
        tick_peaks=(100,) * 6 + (400,) + (50,) * 6,
        compute_seconds=1.0,
        seconds=1.5,
    )
    return replace(made, **changes)


def transfers(text: str) -> tuple[Transfer, ...]:
    return tuple(Transfer.parse(each) for each in text.split())


def test_a_plan_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_swap_plan(path, plan())
    assert read_swap_plan(path) == plan()
    assert "3 of 3" in str(plan())


def test_transfers_are_asked_for_at_packs_and_brings() -> None:
    assert " ".join(map(str, plan().transfers)) == "O0 O1 O2 I1 I0"
    assert (plan().out_bytes, plan().in_bytes) == (190, 160)
    assert plan().peak_bytes_with(600) == 1000


@pytest.mark.parametrize("order", ["O0 O1 O2 I1 I0", "O1 O0 O2 I1 I0", "O0 O1 O2 I0 I1"])
def test_other_orders_that_wait_for_nothing_are_taken(order: str) -> None:
    if order.startswith("O1"):  # O1 is asked for at tick 1, O0 awaited at tick 4
        assert plan(transfers=transfers(order)).transfers[0].storage == 1
    assert plan(transfers=transfers(order)).out_bytes == 190


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"transfers": transfers("O0 O2 O1 I1 I0")}, "O1 stands behind O2"),
        ({"transfers": transfers("I0 O0 O1 O2 I1")}, "O0 stands behind I0"),
        ({"transfers": transfers("O0 O1 O2 I1")}, "I0"),
        ({"transfers": transfers("O0 O1 O2 I1 I0 I2")}, "I2"),
        ({"transfers": transfers("O0 O1 O2 I1 I0 I0")}, "twice"),
        ({"choices": (Swapped(3, 4, 8),)}, "storage 3 of 3"),
        ({"choices": (Swapped(1, 0, 8),)}, "dropped at tick 0"),
        ({"choices": (Swapped(0, 6, 5),)}, "brought at tick 5"),
        ({"choices": (Swapped(0, 6, 10),)}, "brought at tick 10"),
        ({"choices": (Swapped(0, 6, None),)}, "brought at None"),
        ({"choices": (Swapped(1, 1, 8), Swapped(0, 4, 8))}, "ascend"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        plan(**changes)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "elbowroom run plan"},
        {"version": 2},
        {"storages": 3},
        {"choices": [{"storage": 0}]},
        {"transfers": ["X1"]},
        {"more": 1},
    ],
)
def test_other_files_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SwapPlan.from_json({**plan().to_json(), **change})


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"other\.json"):
        read_swap_plan(path)
