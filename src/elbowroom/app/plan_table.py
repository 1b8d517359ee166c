"""What ``plan`` and ``run`` show: the table of layouts, and the terms of one."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from elbowroom.app.plan import Planned
from elbowroom.core.model import ModelFacts
from elbowroom.core.units import format_bytes
from elbowroom.planning.cost import Batch, Term
from elbowroom.planning.pool.layouts import pool_times
from elbowroom.planning.pool.memory import longest_row
from elbowroom.planning.pool.search import Candidate

_COLUMNS = (
    *("layout", "weights", "slots", "workspace", "KV cache", "KV tokens", "rows"),
    *("tokens/s", "finish"),
)
_NOT_RUN = "* to compare with: this version does not run it here"
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
    if any(planned.why_not_run(candidate) for candidate in planned.candidates):
        screen.print(_NOT_RUN, highlight=False, soft_wrap=True)


def explain(planned: Planned, candidate: Candidate) -> list[Term]:
    """Every term of a candidate: its memory, an iteration at its usual batch, and its pool."""
    budget, layout = candidate.budget, candidate.layout
    times = pool_times(planned.model, candidate.cluster, layout)
    rows = candidate.rows_at_once
    context = planned.workload.mean_context
    own_ffn = "W_ffn / (t d)"
    if layout.expert_parallel:
        own_ffn = "(W_ffn - W_experts (d-1)/d) / t"
    terms = [
        Term("memory", budget.memory_bytes, "B", "what the engine may use of one device"),
        Term("- replicated", budget.replicated_bytes, "B", "W_rest / t"),
        Term("- own FFN", budget.ffn_bytes, "B", own_ffn),
        Term("- slots", budget.slot_bytes, "B", "slots x largest layer / t"),
        Term("- workspace", budget.workspace_bytes, "B", "activations, logits"),
        Term("= KV", budget.kv_bytes, "B", "sum"),
        Term("rows", rows, "", "KV tokens / mean row, at most max_num_seqs"),
        Term("context", context, "tokens", "prompt and half of the output, mean"),
        *times.cost.explain(Batch(rows, rows * context)),
    ]
    if layout.num_ranks > 1 and layout.pool != "none":
        fetch = times.fetch_seconds
        trip = times.cost.round_trip_seconds(rows, layout.num_ranks)
        threshold, hiding = times.threshold_batch(context), times.hiding_batch(context)
        never = float("inf")
        terms += [
            Term("fetch", fetch, "s", "borrowed layers / (link bandwidth x share of the link)"),
            Term("round trip", trip, "s", "rows of one layer to its owner and back"),
            Term("B_th", threshold or never, "rows", "smallest batch that streams no slower"),
            Term("B_hide", hiding or never, "rows", "smallest batch that hides the fetch"),
        ]
    return terms


def _row(candidate: Candidate, planned: Planned) -> dict[str, str]:
    budget = candidate.budget
    mark = ">" if candidate is planned.choice.best else " "
    mark += "*" if planned.why_not_run(candidate) else " "
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
