"""Reports of a run on a grid: seconds and bytes at its end, and when each worker waited."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from torch import distributed

from elbowroom.core.trace import Span, write_trace
from elbowroom.core.units import format_bytes
from elbowroom.grid.checkpoint import GATHERED
from elbowroom.grid.clipping import NORM
from elbowroom.grid.grid import Grid
from elbowroom.grid.losses import LOSS
from elbowroom.grid.transport import Waited
from elbowroom.training.losses import LossLog

_WARM_UP = 1
"""First steps that are not counted: they trace the model, and take memory."""


_UNPLANNED = frozenset({LOSS, GATHERED, NORM})
"""What is sent for no layer, and so is in no plan."""


def summary(grid: Grid, log: LossLog, seconds: list[float]) -> list[str]:
    """Lines about a run whose steps took so long; every worker must call it."""
    counts = grid.channel.counts
    planned_for = sum(n.num_bytes for (layer, _), n in counts.items() if layer not in _UNPLANNED)
    others = sum(n.num_bytes for (layer, _), n in counts.items() if layer in _UNPLANNED)
    num_steps = max(1, len(seconds))
    sent = _of_all(grid, (planned_for / num_steps, others / num_steps))
    lines = [log.ends] if log.ends else []
    counted = seconds[_WARM_UP:]
    planned = grid.plan.prediction.seconds
    told = [f"{planned:.6f} s planned"] if planned else []
    if counted:
        told.append(f"{statistics.median(counted):.6f} s measured (median of {len(counted)})")
    else:
        told.append("too few to measure")
    lines.append(f"a step: {', '.join(told)}")
    total = sum(planned for planned, _ in sent)
    expected = grid.plan.prediction.num_bytes
    told = [f"{format_bytes(expected)} planned"] if expected else []
    told.append(f"{format_bytes(round(total))} measured, the loss and checkpoints apart")
    lines.append(f"sent a step by all workers: {', '.join(told)}")
    lines += [
        f"worker {worker}: {format_bytes(round(sum(each)))} sent a step"
        for worker, each in enumerate(sent)
    ]
    return lines


def write_grid_trace(path: Path, grid: Grid) -> None:
    """Write when all workers waited for which messages; every worker must call it.

    Raises OutputError.
    """
    records = _of_all(grid, [tuple(waited) for waited in grid.channel.record])
    if grid.worker:
        return
    spans = [_span(worker, Waited(*row)) for worker, rows in enumerate(records) for row in rows]
    first = min((span.start for span in spans), default=0.0)
    write_trace(
        path,
        [span._replace(start=span.start - first, end=span.end - first) for span in spans],
    )


def _span(worker: int, waited: Waited) -> Span:
    details = {"layer": waited.layer, "direction": waited.direction}
    name = f"{waited.action} {waited.layer}"
    return Span(f"worker {worker}", waited.direction, name, waited.begin, waited.end, details)


def _of_all(grid: Grid, own: Any) -> list[Any]:
    """What every worker has, in their order; all must call it."""
    found: list[Any] = [None] * grid.plan.procs
    distributed.all_gather_object(found, own)
    return found
