"""Parquet files among a job's inputs and results. pyarrow is loaded when one is named."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from elbowroom.core.errors import InputError, first_line

MAGIC = b"PAR1"
"""First bytes of a Parquet file."""

SUFFIX = ".parquet"


class Arrow(NamedTuple):
    """The modules ``pyarrow`` and ``pyarrow.parquet``."""

    base: Any
    parquet: Any


def is_named_parquet(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def load_arrow(path: Path) -> Arrow:
    """Load pyarrow for a file. Raises InputError that says how to install it."""
    try:
        return Arrow(importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet"))
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file: pip install pyarrow, or use JSON lines, with one JSON "
            f"request per line"
        ) from error


@contextmanager
def explained_table(path: Path, arrow: Arrow) -> Iterator[None]:
    """Turn an error of reading a table into an InputError."""
    try:
        yield
    except (arrow.base.ArrowException, OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"cannot read {path}: {reason.rstrip('.')}. Write it again") from error
