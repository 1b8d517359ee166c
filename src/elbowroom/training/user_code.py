"""Which code is the user's own: not Python's, not torch's, not ours."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

import torch

_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parents[1]
_STDLIB, _PACKAGES = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))


def is_machinery(path: Path) -> bool:
    """Whether a file is Python's, torch's or ours. Those of other packages are not."""
    in_stdlib = path.is_relative_to(_STDLIB) and not path.is_relative_to(_PACKAGES)
    return in_stdlib or path.is_relative_to(_TORCH) or path.is_relative_to(_OURS)


def is_own(path: Path) -> bool:
    """Whether a file is the user's own, and of no package."""
    return path.exists() and not is_machinery(path) and not path.is_relative_to(_PACKAGES)


def where(error: BaseException) -> str:
    """Text that points at the innermost line of the user's own code; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.exists() and not is_machinery(path):
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f" ({path}:{frame.lineno}: `{line}`)"
    return ""
