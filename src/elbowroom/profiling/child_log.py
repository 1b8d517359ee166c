"""Log files for measuring processes, whose output would be interleaved on the screen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from elbowroom.core.errors import MeasuringError


@contextmanager
def child_log(what: str) -> Iterator[IO[bytes]]:
    """Yield a file for the standard errors of children, which is removed at the end.

    If the block raises MeasuringError the file stays, and the message says where it is.
    """
    descriptor, name = tempfile.mkstemp(prefix=f"elbowroom-{what}-", suffix=".log")
    log = Path(name)
    with os.fdopen(descriptor, "wb") as file:
        try:
            yield file
        except MeasuringError as error:
            raise MeasuringError(f"{error}. What it printed: {log}") from error
        except BaseException:
            log.unlink()
            raise
    log.unlink()
