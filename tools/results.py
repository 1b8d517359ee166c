"""The dated files in bench/results, and Markdown tables made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def load(name: str) -> dict[str, Any]:
    """The newest results of one benchmark."""
    found = list(RESULTS.glob(f"{name}-20*.json"))
    if not found:
        raise SystemExit(f"no results of {name} in {RESULTS}: run python -m bench.{name}")
    newest = max(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
    data: dict[str, Any] = json.loads(newest.read_text())
    return data


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
    commit = f"commit {data['commit'][:7]}, " if "commit" in data else ""
    return f"{data['date']}, {commit}{machine['cpu']}, {machine['cores']} cores"


def over(rounds: list[dict[str, Any]], one: str, other: str) -> str:
    key = "tokens_per_second"
    return ratios(each[one][key] / each[other][key] for each in rounds)
