"""Recipes round-trip in step profiles; recipes that no step can follow are refused when read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.recipe import Call, Made, Recipe, Setting, TensorArgument
from elbowroom.core.step_profile import StepProfile, read_step_profile, write_step_profile
from tests.planning.swap.profiles import two_storages

READ = TensorArgument(0, "float32", (2, 3), (3, 1), 4)
WEIGHT = TensorArgument("norm.weight", "bfloat16", (), (), 0)
WIDER = TensorArgument(Made(0, 1), "float64", (2,), (1,), 0)
RECIPE = Recipe(
    calls=(
        Call("torch.Tensor.to", (READ, Setting("dtype", "float64")), {"copy": True}),
        Call("torch.cat", ((WIDER, WEIGHT), -1, 0.5, "same", None)),
    ),
    result=Made(1, 0),
    seconds=0.25,
    extra_bytes=64,
)


def with_recipe(recipe: Recipe) -> StepProfile:
    """A profile whose second storage is made from the first, which is there all the time."""
    profile = two_storages()
    first, second = profile.storages
    first = replace(first, unpack_ticks=(2, 3), bring=7)
    return replace(profile, storages=(first, replace(second, bring=8, recipe=recipe)))


def test_a_profile_with_recipes_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    write_step_profile(path, with_recipe(RECIPE))
    assert read_step_profile(path) == with_recipe(RECIPE)


def test_what_a_recipe_reads() -> None:
    assert RECIPE.sources == (0,)
    assert RECIPE.names == ("norm.weight",)
    assert [each.source for each in RECIPE.calls[1].tensors()] == ["norm.weight", Made(0, 1)]


def changed(path: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(asdict(RECIPE)))
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("calls", []),
        ("calls", [{"function": "torch.cat", "args": [], "kwargs": {}}] * 1001),
        ("calls.0.function", 3),
        ("calls.0.args", None),
        ("calls.0.args.0.source", None),
        ("calls.0.args.0.source", True),
        ("calls.0.args.0.source", {"call": 0, "output": 0}),
        ("calls.0.args.0.dtype", 4),
        ("calls.0.args.0.shape", [2, 3, 4]),
        ("calls.0.args.0.stride", [3, -1]),
        ("calls.0.args.0.offset", 1.5),
        ("calls.0.args.0.more", 1),
        ("calls.0.args.1.kind", "layout"),
        ("calls.0.args.1.name", None),
        ("calls.0.kwargs.copy", {}),
        ("calls.1.args.2", float("inf")),
        ("calls.1.args.0.0.source.call", 1),
        ("calls.1.args.0.0.source.output", -1),
        ("result.call", 2),
        ("seconds", -1.0),
        ("seconds", float("nan")),
        ("seconds", None),
        ("extra_bytes", 0.5),
        ("extra_bytes", -1),
    ],
)
def test_recipes_that_cannot_be_are_refused(path: str, value: Any) -> None:
    data = with_recipe(RECIPE).to_json()
    storages = [dict(each) for each in data["storages"]]
    storages[1]["recipe"] = changed(path, value)
    with pytest.raises(InputError):
        StepProfile.from_json({**data, "storages": storages})


@pytest.mark.parametrize(
    "change",
    [
        {"pack_ticks": (2,), "unpack_ticks": (3,), "bring": 11},  # saved after what is made of it
        {"release": 8},  # gone by then
        {"unpack_ticks": (), "bring": None},  # never back
    ],
)
def test_sources_that_are_not_there_are_refused(change: dict[str, Any]) -> None:
    profile = with_recipe(RECIPE)
    first, second = profile.storages
    with pytest.raises(InputError, match="made from storage 0"):
        replace(profile, storages=(replace(first, **change), second))


def test_sources_that_are_not_known_are_refused() -> None:
    call = Call("torch.relu", (replace(READ, source=7),))
    with pytest.raises(InputError, match="storage 7 of 2"):
        with_recipe(Recipe((call,), Made(0, 0), 0.0, 0))
