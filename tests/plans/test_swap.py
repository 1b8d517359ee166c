"""Swap plans round-trip, and plans that could not be carried out are refused when read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.recipe import Call, Made, Recipe, TensorArgument
from elbowroom.plans.swap import (
    Choice,
    PlannedStorage,
    Recomputed,
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


def recipe(*sources: int) -> Recipe:
    read = tuple(TensorArgument(source, "uint8", (1,), (1,), 0) for source in sources)
    return Recipe((Call("torch.cat", (read,)),), Made(0, 0), 0.125, 10)


def test_recomputed_storages_are_not_moved(tmp_path: Path) -> None:
    choices = (Swapped(0, 4, 8), Recomputed(1, recipe(0)), Swapped(2, 5, None))
    made = plan(choices=choices, transfers=default_order(STORAGES, choices))
    assert " ".join(map(str, made.transfers)) == "O0 O2 I0"
    assert (made.out_bytes, made.in_bytes, made.recomputed_bytes) == (130, 100, 60)
    assert (len(made.swapped), len(made.recomputed), made.sources) == (2, 1, {0})
    assert made.need_ticks[0] == 8  # the replay is before its own use at 9
    assert "2 of 3" in str(made) and "1 recomputed" in str(made)
    path = tmp_path / "plan.json"
    write_swap_plan(path, made)
    assert read_swap_plan(path) == made


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ((Recomputed(2, recipe(0)),), "never asked for"),
        ((Recomputed(1, recipe(3)),), "storage 3 of 3"),
        ((Recomputed(1, recipe(2)),), "saved before"),
        ((Recomputed(0, recipe(1)),), "saved before"),
        ((Recomputed(0, recipe()), Recomputed(1, recipe(0))), "recomputed itself"),
        ((Swapped(0, 4, 9), Recomputed(1, recipe(0))), "brought at tick 9"),
        ((Swapped(0, 9, 9), Recomputed(1, recipe(0))), "brought at tick 9"),
    ],
)
def test_recomputing_from_what_is_not_there_is_refused(
    choices: tuple[Choice, ...], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        plan(choices=choices, transfers=default_order(STORAGES, choices))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_threads": "two"},
        {"num_threads": 10**9},
        {"num_threads": 0},
        {"seconds": None},
        {"seconds": float("nan")},
        {"compute_seconds": "abc"},
        {"tier": 5},
        {"budget_bytes": "24MiB"},
        {"budget_bytes": True},
        {"budget_bytes": -1},
        {"held_gradient_bytes": "x"},
        {"swaps_optimizer": 1},
        {"tick_peaks": (100,) * 6 + ("x",) + (50,) * 6},
        {"storages": (PlannedStorage(100, (), 9), *STORAGES[1:])},
        {"storages": (PlannedStorage(100, (2, 0), 9), *STORAGES[1:])},
        {"storages": (PlannedStorage(1.5, (0, 2), 9), *STORAGES[1:])},  # type: ignore[arg-type]
        {"choices": (Swapped(0, "4", 8), *CHOICES[1:])},  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_values_of_another_kind(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        plan(**changes)
