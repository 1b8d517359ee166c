"""The table of layouts that ``plan`` and ``run`` show."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from elbowroom.app.plan import Planned
from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes
from elbowroom.planning.pool.memory import longest_row
from elbowroom.planning.pool.search import Candidate

_COLUMNS = (
    *("layout", "weights", "slots", "workspace", "KV cache", "KV tokens", "rows"),
    *("tokens/s", "finish"),
)
_NARROW = ("layout", "KV tokens", "finish")
_FULL_WIDTH = 110
"""Columns of a screen that has room for all of the table's."""


def print_plan_table(screen: Console, planned: Planned) -> None:
    """All candidates, the fastest first, the best marked; fewer columns on a narrow terminal."""
    width = screen.width if screen.is_terminal else max(screen.width, _FULL_WIDTH)
    columns = _COLUMNS if width >= _FULL_WIDTH else _NARROW
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in columns:
        overflow = "fold" if name == "finish" else "ignore"
        table.add_column(
            name,
            justify="left" if name == "layout" else "right",
            no_wrap=name != "finish",
            overflow=overflow,  # type: ignore[arg-type]
        )
    for candidate in planned.candidates:
        row = _row(candidate, planned)
        table.add_row(*(row[name] for name in columns))
    before, screen.width = screen.width, width
    screen.print(table)
    screen.width = before


def _row(candidate: Candidate, planned: Planned) -> dict[str, str]:
    budget = candidate.budget
    mark = "> " if candidate is planned.choice.best else "  "
    row = {
        "layout": f"{mark}{candidate.layout}",
        "weights": format_bytes(budget.weight_bytes),
        "slots": format_bytes(budget.slot_bytes),
        "workspace": format_bytes(budget.workspace_bytes),
        "KV cache": format_bytes(max(0, budget.kv_bytes)),
        "KV tokens": _kv_tokens(candidate, planned.model),
        "rows": "-",
        "tokens/s": "-",
        "finish": candidate.why_out,
    }
    if candidate.fits and planned.machines.is_measured:
        finish = f"{_time(candidate.seconds)} +-{candidate.cluster.uncertainty:.0%}"
        row |= {"tokens/s": f"{candidate.tokens_per_second:.0f}", "finish": finish}
    if candidate.fits:
        row["rows"] = str(candidate.rows_at_once)
    return row


def _kv_tokens(candidate: Candidate, model: ModelFacts) -> str:
    """Tokens of the KV cache for the longest row, as vLLM counts them."""
    budget = candidate.budget
    return budget.kv_tokens_text(candidate.engine.max_model_len or longest_row(model, budget))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
