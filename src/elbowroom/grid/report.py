"""Reports of a run on a grid: seconds and bytes at its end, and when each worker waited."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from torch import distributed

from elbowroom.core.trace import Span, write_trace
from elbowroom.core.units import format_bytes
from elbowroom.grid.grid import Grid
from elbowroom.grid.transport import Waited
from elbowroom.training.losses import LossLog

_WARM_UP = 1
"""First steps that are not counted: they trace the model, and take memory."""


def summary(grid: Grid, log: LossLog, seconds: list[float]) -> list[str]:
    """Lines about a run whose steps took so long; every worker must call it."""
    num_bytes = sum(count.num_bytes for count in grid.channel.counts.values())
    sent = _of_all(grid, num_bytes // max(1, len(seconds)))
    lines = [log.ends] if log.ends else []
    counted = seconds[_WARM_UP:]
    planned = grid.plan.prediction.seconds
    told = [f"{planned:.6f} s planned"] if planned else []
    if counted:
        told.append(f"{statistics.median(counted):.6f} s measured (median of {len(counted)})")
    else:
        told.append("too few to measure")
    lines.append(f"a step: {', '.join(told)}")
    lines += [
        f"worker {worker}: {format_bytes(each)} sent a step" for worker, each in enumerate(sent)
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
