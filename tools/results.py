"""The dated files in bench/results, and Markdown tables made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def all_of(name: str) -> list[dict[str, Any]]:
    """All results of one benchmark, the newest last."""
    found = sorted(RESULTS.glob(f"{name}-20*.json"), key=_date_and_number)
    if not found:
        raise SystemExit(f"no results of {name} in {RESULTS}: run python -m bench.{name}")
    return [json.loads(path.read_text()) for path in found]


def load(name: str) -> dict[str, Any]:
    """The newest results of one benchmark."""
    return all_of(name)[-1]


def _date_and_number(path: Path) -> list[int]:
    """Date of ``NAME-2026-11-26-2.json``, and the number that tells those of a day apart."""
    return [int(part) for part in re.findall(r"\d+", path.stem)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def ratios(values: Iterable[float]) -> str:
    """A median, and every round behind it."""
    rounds = list(values)
    return f"{median(rounds):.2f}x ({', '.join(f'{value:.2f}' for value in rounds)})"


def where(data: dict[str, Any]) -> str:
    """When, at which commit (older files do not say) and on what it was measured."""
    machine = data["machine"]
    changed = " with changes" if data.get("commit", "").endswith("-dirty") else ""
    commit = f"commit {data['commit'][:7]}{changed}, " if "commit" in data else ""
    return f"{data['date']}, {commit}{machine['cpu']}, {machine['cores']} cores"


def over(rounds: list[dict[str, Any]], one: str, other: str) -> str:
    key = "tokens_per_second"
    return ratios(each[one][key] / each[other][key] for each in rounds)
