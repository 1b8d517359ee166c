"""Step profiles round-trip; facts that contradict each other are refused when read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.step_profile import (
    ReadyGradient,
    StepProfile,
    read_step_profile,
    write_step_profile,
)
from tests.planning.swap.profiles import two_storages


def test_a_profile_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    write_step_profile(path, two_storages())
    assert read_step_profile(path) == two_storages()


def test_gradients_round_trip(tmp_path: Path) -> None:
    path, gradients = tmp_path / "step.json", (ReadyGradient(2, 10), ReadyGradient(3, 0))
    profile = replace(two_storages(), gradients=gradients)
    write_step_profile(path, profile)
    assert read_step_profile(path) == profile


def test_a_profile_of_before_knows_no_gradients() -> None:
    data = two_storages().to_json()
    del data["gradients"]
    assert StepProfile.from_json(data).gradients == ()


def test_what_follows_from_the_facts() -> None:
    profile = two_storages()
    assert profile.compute_seconds == pytest.approx(1.1)
    assert (profile.num_ticks, profile.num_states) == (4, 14)
    assert [storage.pack_tick for storage in profile.storages] == [0, 1]
    assert [storage.use_tick for storage in profile.storages] == [3, 2]
    assert not any(storage.is_held_elsewhere for storage in profile.storages)


def changed(path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(two_storages().to_json()))
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "elbowroom layer graph"),
        ("version", 2),
        ("more", 1),
        ("deltas", None),
        ("deltas.0", 1.5),
        ("deltas.0", 10**16),
        ("deltas.1", 5),
        ("tick_positions", [1, 4, 6]),
        ("tick_positions", [4, 1, 6, 10]),
        ("tick_positions.3", 13),
        ("seconds.0", -1.0),
        ("seconds.0", float("nan")),
        ("static_bytes", -1),
        ("num_forward_ticks", 5),
        ("storages.0.number", 1),
        ("storages.0.num_bytes", True),
        ("storages.0.made_by", None),
        ("storages.0.pack_ticks", []),
        ("storages.0.unpack_ticks", [4]),
        ("storages.0.unpack_ticks", [0]),
        ("storages.0.unpack_ticks", [2, 2]),
        ("storages.0.bring", None),
        ("storages.0.free", 99),
        ("storages.0.release", -1),
        ("gradients", 1),
        ("gradients", [{"tick": 4, "num_bytes": 1}]),
        ("gradients", [{"tick": -1, "num_bytes": 1}]),
        ("gradients", [{"tick": 0, "num_bytes": -1}]),
        ("gradients", [{"tick": 0}]),
        ("gradients", [{"tick": 3, "num_bytes": 1}, {"tick": 2, "num_bytes": 1}]),
    ],
)
def test_facts_that_cannot_be_are_refused(path: str, value: Any) -> None:
    with pytest.raises(InputError):
        StepProfile.from_json(changed(path, value))
