"""A CNN that needs 122 MB beside its weights trains in 36 MB, where the system refuses more.

The system refuses by a limit on private memory, or kills what is beyond the limit of its
group.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.swap.steps import needed_meter

pytestmark = pytest.mark.nightly


def train(
    budget: str, limit_mb: str, folder: Path, group: Path | None = None
) -> dict[str, Any] | str:
    """Losses and peak of a run in a process of its own, or the error that ended it."""
    command = [sys.executable, "-m", "tests.swap.limit_member", budget, limit_mb, str(folder)]
    if group is not None:
        enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, "enter", *command]
    # What is released goes back to the system at once, where the limit counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    if done.returncode:
        return done.stderr.splitlines()[-1]
    return dict(json.loads(done.stdout))


class LimitFiles(NamedTuple):
    """Names of a group's files, by the version of control groups."""

    limit: str
    most: str


FILES = [
    LimitFiles("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    LimitFiles("memory.max", "memory.peak"),
]


@contextmanager
def memory_group() -> Iterator[Path]:
    """A control group that can limit memory; where none can be made, the test is skipped."""
    for parent in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = parent / f"elbowroom-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if any((group / files.limit).exists() for files in FILES):
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("no control group for memory can be made: run this as root")


def most_bytes(budget: str, folder: Path) -> int:
    """The most that a run's group holds, all of the process and its files' pages included."""
    with memory_group() as group:
        done = train(budget, "none", folder, group)
        assert isinstance(done, dict), done
        name = next(files.most for files in FILES if (group / files.most).exists())
        return int((group / name).read_text())


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups are Linux's")
def test_a_group_that_kills_the_plain_run_lets_the_swapped_one_finish(tmp_path: Path) -> None:
    needed_meter()
    plain, swapped = most_bytes("none", tmp_path), most_bytes("36MB", tmp_path)
    assert swapped < plain - 40_000_000
    with memory_group() as group:
        name = next(files.limit for files in FILES if (group / files.limit).exists())
        (group / name).write_text(str((plain + swapped) // 2))
        assert train("none", "none", tmp_path, group) == "SIGKILL"
        done = train("36MB", "none", tmp_path, group)
    expected = train("none", "none", tmp_path)
    assert isinstance(done, dict) and isinstance(expected, dict), done
    assert done["losses"] == expected["losses"]
    print(f"{plain} bytes plain, {swapped} swapped, {(plain + swapped) // 2} allowed")
