"""Ties between processes, and the measure of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elbowroom.core.host import die_with_parent
from elbowroom.core.units import MIB
from elbowroom.engine.process import resident_bytes, return_freed_memory

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
_CHILD = """
import time
from elbowroom.core.host import die_with_parent
die_with_parent()
print("tied", flush=True)
time.sleep(60)
"""


@linux_only
def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(child)


@linux_only
def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from elbowroom.core.host import die_with_parent as d; d(1)"  # 1 is not its parent
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


_SPAWNS = """
import multiprocessing, sys, time
from elbowroom.engine.process import tie_children
if __name__ == "__main__":
    tie_children()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    sys.stdin.read()
"""


@linux_only
def test_a_spawned_process_ends_with_its_parent_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(_SPAWNS)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "spawns.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@linux_only
def test_memory_that_is_touched_counts() -> None:
    before = resident_bytes()
    block = bytearray(os.urandom(1) * (64 * MIB))
    grown = resident_bytes() - before
    assert 60 * MIB <= grown <= 72 * MIB
    del block
    return_freed_memory()
    assert resident_bytes() - before <= 8 * MIB


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert resident_bytes() == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "getppid", lambda: pytest.fail("asked for the parent"))
    die_with_parent()
