"""The one pass over a job's input: where rows begin, which ids repeat, in which order to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.job import JobOptions, ScannedInput
from elbowroom.jobs.order import OrderBuilder


@contextmanager
def scanned(source: BatchInput | Path, options: JobOptions) -> Iterator[ScannedInput]:
    """Open and scan a job's input. Raises InputError when it cannot be read or has no rows."""
    with BatchFile(source, options.limits) as batch:
        if options.order == "input":
            yield ScannedInput(batch, range(batch.scan().num_rows))
        else:
            builder = OrderBuilder()
            batch.scan(builder.visit)
            yield ScannedInput(batch, builder.order())
