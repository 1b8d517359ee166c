"""A CNN that needs 122 MB beside its weights trains in 36 MB, where the system refuses more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.swap.steps import needed_meter

pytestmark = pytest.mark.nightly


def train(budget: str, limit_mb: str, folder: Path) -> dict[str, Any] | str:
    """Losses and peak of a run in a process of its own, or the error that ended it."""
    command = [sys.executable, "-m", "tests.swap.limit_member", budget, limit_mb, str(folder)]
    # What is released goes back to the system at once, where the limit counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr.splitlines()[-1]
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA as on Linux")
def test_a_third_of_the_memory_is_enough(tmp_path: Path) -> None:
    needed_meter()
    plain = train("none", "none", tmp_path)
    refused = train("none", "100", tmp_path)
    swapped = train("36MB", "40", tmp_path)
    assert isinstance(refused, str) and "allocate memory" in refused
    assert isinstance(plain, dict) and isinstance(swapped, dict), swapped
    assert swapped["losses"] == plain["losses"]
    assert 0 < swapped["peak_bytes"] <= 36_000_000
