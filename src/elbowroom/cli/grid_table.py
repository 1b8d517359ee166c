"""Table of a grid plan: for each layer its parts, what moves, and what that takes."""

from __future__ import annotations

from elbowroom.cli.screen import Console
from elbowroom.core.units import format_bytes
from elbowroom.planning.grid.explanation import GridExplanation, GridTerms, LayerExplanation
from elbowroom.planning.grid.plan import PlannedGrid

_FILE_WIDTH = 100
"""Characters of a line that is not for a terminal, at least."""
_GRID = "batch x space x out x in"
_COLUMNS = ("layer", "grid", "what moves", "bytes", "ms", "compute", "memory")
_DISPENSABLE = ("compute", "bytes", "what moves", "memory")
"""Columns that are left out where there is no room for all, in this order."""
_TEXTS = ("layer", "grid", "what moves")
_MOVES = {"halo": "halo", "weights": "weights", "norms": "norms", "moves": "layout"}
"""Terms that are communication, and what the table calls them."""


def print_grid_plan(screen: Console, planned: PlannedGrid, counted: GridExplanation) -> None:
    """Each layer that has a layout of its own, and totals beside those of simpler plans.

    ``counted`` is the same plan on a link whose seconds are bytes. There are fewer columns on a
    narrow terminal.
    """
    width = screen.width_of(_FILE_WIDTH)
    layers = planned.explanation.layers
    rows = [_row(*each) for each in zip(layers, (one.terms for one in counted.layers), strict=True)]
    columns = _columns(rows, width)
    screen.print_rows(columns, rows, width, texts=_TEXTS, wraps="layer", cut=_COLUMNS)
    screen.say(f"grid       {_GRID}; bytes and ms are what the busiest worker sends")
    for name, text in _totals(planned, counted):
        screen.say(f"{name:<10} {text}")


def _columns(rows: list[dict[str, str]], width: int) -> tuple[str, ...]:
    """Names of the columns that fit with nothing cut; where none do, of those that matter most."""
    widths = {name: 1 + max(map(len, (name, *(row[name] for row in rows)))) for name in _COLUMNS}
    columns = list(_COLUMNS)
    for name in _DISPENSABLE:
        if sum(widths[each] for each in columns) <= width:
            break
        columns.remove(name)
    return tuple(columns)


def _row(layer: LayerExplanation, counted: GridTerms) -> dict[str, str]:
    terms = layer.terms
    moved = [called for name, called in _MOVES.items() if getattr(terms, name) > 0]
    return {
        "layer": layer.grid.name,
        "grid": "whole" if layer.is_whole else str(layer.grid),
        "what moves": ", ".join(moved) or "-",
        "bytes": format_bytes(round(counted.communication)) if counted.communication else "-",
        "ms": _milliseconds(terms.communication) if terms.communication else "-",
        "compute": _milliseconds(terms.compute) if terms.compute else "-",
        "memory": format_bytes(round(terms.memory_bytes)) if terms.memory_bytes else "-",
    }


def _totals(planned: PlannedGrid, counted: GridExplanation) -> list[tuple[str, str]]:
    plan, found = planned.plan, planned.explanation
    total = found.total
    iteration = f"{_milliseconds(total.communication)} ms of communication"
    if total.compute:
        iteration = (
            f"{_milliseconds(found.seconds)} ms: {_milliseconds(total.compute)} of compute, "
            f"{iteration}, {_milliseconds(found.hidden_seconds)} of it hidden"
        )
    else:
        iteration += "; compute is not known: give --flops, or a profile"
    rows = [
        ("iteration", iteration),
        ("by batch", _beside(found.seconds, found.batch_seconds, "", "fewer samples than workers")),
        (
            "paper",
            _beside(
                found.seconds,
                found.paper_seconds,
                " by its own formulas, in which norms and joins are free",
                "its forms do not go round",
            ),
        ),
        (
            "sent",
            f"{format_bytes(plan.prediction.num_bytes)} in {plan.prediction.messages} messages by "
            f"all workers; {format_bytes(round(counted.total.communication))} by the busiest",
        ),
        ("memory", f"{format_bytes(plan.prediction.memory_bytes)} of one worker"),
    ]
    if not found.is_exact:
        rows.append(("search", "not all grids were tried together: there may be better ones"))
    if found.whole:
        names = ", ".join(found.whole)
        rows.append(("whole", f"{names}: no rule splits them, so every worker computes all"))
    return rows


def _beside(seconds: float, other: float | None, how: str, why: str) -> str:
    """Another plan's seconds, and how many times as long they are; why there are none."""
    if other is None:
        return f"none: {why}"
    times = f", {other / seconds:.2f}x as long" if seconds else ""
    return f"{_milliseconds(other)} ms{times}{how}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds else "0"
