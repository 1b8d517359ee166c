"""How many examples a property is tried on: a quarter on each push, all of them every night."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

IS_NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def examples(number: int, **others: Any) -> settings:
    """``number`` examples every night, and at least ten on each push."""
    return settings(max_examples=number if IS_NIGHTLY else max(10, number // 4), **others)
