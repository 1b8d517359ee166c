"""What torch's DTensor does with a convolution that is split in space: why grids have their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.grid.dtensor_member import NUM_PROCESSES

SECONDS = 60.0
BATCH, HEIGHT = 0, 2


class DTensorIsWrongError(AssertionError):
    """Outputs or gradients differ, or it raised, or its processes ended or hung."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: first of the batch, then of the height, which may end them."""
    folder = tmp_path_factory.mktemp("dtensor")
    command = (sys.executable, "-m", "tests.grid.dtensor_member", str(folder))
    processes = [
        subprocess.Popen((*command, str(number), str(BATCH), str(HEIGHT)))
        for number in range(NUM_PROCESSES)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


def check(folder: Path, dim: int) -> None:
    for number in range(NUM_PROCESSES):
        found = folder / f"{number}-{dim}.json"
        if not found.exists():
            raise DTensorIsWrongError(f"process {number} ended, or hung")
        if not json.loads(found.read_text())["is_right"]:
            raise DTensorIsWrongError(found.read_text())


def test_a_convolution_split_in_its_batch(folder: Path) -> None:
    """Right, by the same processes and the same code."""
    check(folder, BATCH)


@pytest.mark.xfail(
    strict=True,
    raises=DTensorIsWrongError,
    reason="torch's DTensor takes no rows of neighbours: along H a convolution of kernel 3 and "
    "padding 1 is silently wrong. If this passes, say so in the guide on grids",
)
def test_a_convolution_split_along_height(folder: Path) -> None:
    try:
        check(folder, BATCH)
    except DTensorIsWrongError as error:
        raise RuntimeError("not even the batch can be split: the height says nothing") from error
    check(folder, HEIGHT)
