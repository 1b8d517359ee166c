"""The one pass over a job's input: where rows begin, which ids repeat, in which order to work."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.job import JobOptions, ScannedInput
from elbowroom.jobs.order import OrderBuilder
from elbowroom.jobs.preflight import FileSummary


@contextmanager
def scanned(
    source: BatchInput | Path, options: JobOptions, models: Collection[str] = ()
) -> Iterator[ScannedInput]:
    """Open and scan a job's input. ``models`` are names whose rows are counted for certain.

    Raises InputError when it cannot be read or has no rows.
    """
    summary = FileSummary.knowing(models)
    builder = None if options.order == "input" else OrderBuilder()
    with BatchFile(source, options.limits) as batch:
        batch.scan(summary.visit, *([builder.visit] if builder else []))
        yield ScannedInput(batch, builder.order() if builder else range(batch.num_rows), summary)
