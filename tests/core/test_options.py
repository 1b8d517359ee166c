"""Options from Python and from the command line: one declaration, the same values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elbowroom.app.plan_settings import PlanSettings
from elbowroom.cli.flags import add_options, settings_of
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError
from elbowroom.core.options import option, options_of, read_options
from elbowroom.jobs.job import JobOptions
from elbowroom.jobs.limits import RowLimits


@dataclass(frozen=True)
class Some:
    memory_bytes: int | None = option(None, "size", "", "a", flag="--memory", is_planned=True)
    pool: str | None = option(None, "text", "", "a", choices=("x", "y"), is_planned=True)
    names: tuple[str, ...] = option((), "names", "", "a", flag="--name")
    hosts: frozenset[str] = option(frozenset(), "names", "", "a")
    retries: int = option(3, "number", "", "b")
    is_slow: bool = option(False, "switch", "", "b")
    grace: float = option(5.0, "seconds", "", "b")
    room: int | None = option(None, "memory", "", "b")
    path: Path | None = option(None, "path", "", "b")  # noqa: RUF009


@pytest.mark.parametrize(
    ("given", "read", "words"),
    [
        ({"memory": "2KiB"}, {"memory_bytes": 2048}, ["--memory", "2KiB"]),
        ({"memory_bytes": 7}, {"memory_bytes": 7}, ["--memory", "7"]),
        ({"memory": "auto"}, {"memory_bytes": None}, ["--memory", "auto"]),
        ({"pool": "auto"}, {"pool": None}, ["--pool", "auto"]),
        ({"pool": "y"}, {"pool": "y"}, ["--pool", "y"]),
        ({"name": "m"}, {"names": ("m",)}, ["--name", "m"]),
        ({"names": ["m", "n"]}, {"names": ("m", "n")}, ["--name", "m", "--name", "n"]),
        ({"hosts": ["h"]}, {"hosts": frozenset(["h"])}, ["--hosts", "h"]),
        ({"retries": 0}, {"retries": 0}, ["--retries", "0"]),
        ({"is_slow": True}, {"is_slow": True}, ["--is-slow"]),
        ({"grace": 2}, {"grace": 2.0}, ["--grace", "2"]),
        ({"room": "512B"}, {"room": 512}, ["--room", "512B"]),
        ({"room": 2**20}, {"room": 2**20}, ["--room", str(2**20)]),
        ({"path": "a"}, {"path": Path("a")}, ["--path", "a"]),
    ],
)
def test_both_ways_to_give_an_option(
    given: dict[str, Any], read: dict[str, Any], words: list[str]
) -> None:
    assert read_options(Some, given) == read
    parser = argparse.ArgumentParser()
    add_options(parser, Some)
    assert Some(**settings_of(parser.parse_args(words), Some)) == Some(**read)


@pytest.mark.parametrize(
    "given",
    [
        {"memory": 0},
        {"memory": "much"},
        {"pool": "z"},
        {"pool": ["x"]},
        {"names": 5},
        {"names": [5]},
        {"retries": -1},
        {"retries": True},
        {"retries": None},
        {"is_slow": "yes"},
        {"grace": -0.1},
        {"grace": float("nan")},
        {"grace": 10**400},
        {"retries": 10**5000},
        {"room": 512},
        {"room": "512"},
        {"room": 0},
        {"path": 5},
        {"memory": "2KiB", "memory_bytes": 2048},
    ],
)
def test_what_an_option_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read_options(Some, given)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--memory", "0"),
        ("--memory", str(2**63 - 1)),
        ("--retries", "9" * 25),
        ("--retries", "9" * 5000),
        ("--grace", "1e308"),
        ("--room", "512"),
    ],
)
def test_numbers_that_a_flag_does_not_take(
    flag: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Some)
    with pytest.raises(SystemExit):
        parser.parse_args([flag, text])
    assert f"argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize("settings", [PlanSettings, RowLimits, JobOptions])
def test_flags_have_the_defaults_of_fields(settings: type) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, settings)
    found = settings_of(parser.parse_args([]), settings)
    assert found == {each.name: each.default for each, _ in options_of(settings)}
    assert len(found) >= 4


def test_groups_alone() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Some, ["b"])
    args = parser.parse_args([])
    names = {"retries", "is_slow", "grace", "room", "path"}
    assert set(vars(args)) == names == set(settings_of(args, Some, ["b"]))


@pytest.mark.parametrize("flags", [("--seed", "7"), ("--pool", "none"), ("--memory", "1GiB")])
def test_a_plan_has_its_own_options(
    flags: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    assert main(["run", *files, "--plan", str(tmp_path / "plan.json"), *flags]) == 2
    assert flags[0] in capsys.readouterr().err
