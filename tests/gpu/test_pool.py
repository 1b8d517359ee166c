"""A pool between processes that share one GPU, or a stand-in for one. Needs no engine.

Links between GPUs are not tested here: there is one device.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from elbowroom.core.units import GIB, MIB
from tests.pool.fake_cudart import FakeRuntime, fake_folder

DEVICE = "cuda" if torch.cuda.is_available() else "fake"
"""Without a GPU, CUDA's runtime is a stand-in: the store runs, in the memory of the CPU."""

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BATCHES = 100 if DEVICE == "cuda" else 10
LATER = () if DEVICE == "cuda" else pytest.mark.nightly
"""Marks what is much like others, where every process takes seconds of a CPU to start."""

ROOT = Path(__file__).parents[2]
BFLOAT16_ERROR = 1e-2
"""Joined rows may take another kernel, which sums in another order."""

Member = subprocess.Popen[str]


def _later(*values: object) -> Any:
    return pytest.param(*values, marks=LATER)


@contextmanager
def _members(
    run_dir: Path, num_ranks: int, mode: str, slots: int, batches: int, **environment: str
) -> Iterator[list[Member]]:
    """A group whose processes are ready to compute."""
    members = []
    try:
        for rank in range(num_ranks):
            arguments = (run_dir, rank, num_ranks, mode, slots, batches, DEVICE)
            command = [sys.executable, "-m", "tests.gpu.member", *map(str, arguments)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            env = {**os.environ, **environment}
            members.append(subprocess.Popen(command, text=True, cwd=ROOT, env=env, **pipes))
        for member in members:
            assert _line(member) == "ready"
        yield members
    finally:
        for member in members:
            member.kill()
            member.communicate()


def _line(member: Member) -> str:
    assert member.stdout is not None
    assert member.stderr is not None
    line = member.stdout.readline().strip()
    assert line, f"a member died: {member.stderr.read()}"
    return line


def _go_on(member: Member) -> None:
    assert member.stdin is not None
    member.stdin.write("\n")
    member.stdin.flush()


def _outcomes(members: list[Member]) -> list[dict[str, Any]]:
    """What each saw; all compute at once, and end after all have computed."""
    for member in members:
        _go_on(member)
    outcomes = [json.loads(_line(member)) for member in members]
    for member in members:
        _go_on(member)
    for member in members:
        assert member.wait(60) == 0, member.communicate()
    return outcomes


@pytest.mark.parametrize(("num_ranks", "slots"), [_later(2, 1), _later(3, 1), (3, 2)])
def test_streamed_equals_local(tmp_path: Path, num_ranks: int, slots: int) -> None:
    """The same kernels on the same bytes: equal to the last bit."""
    with _members(tmp_path, num_ranks, "streamed", slots, BATCHES) as members:
        for outcome in _outcomes(members):
            assert outcome["worst"] == 0
            assert outcome["stats"]["streamed_bytes"] > 0


def test_mapped_equals_local(tmp_path: Path) -> None:
    with _members(tmp_path, 2, "mapped", 0, BATCHES // 5) as members:
        for outcome in _outcomes(members):
            assert outcome["worst"] == 0
            assert outcome["stats"]["mapped_bytes"] > 0


@pytest.mark.parametrize("num_ranks", [_later(2), 3])
def test_shipped_equals_local(tmp_path: Path, num_ranks: int) -> None:
    with _members(tmp_path, num_ranks, "shipped", 1, BATCHES) as members:
        for outcome in _outcomes(members):
            assert outcome["worst"] < BFLOAT16_ERROR
            assert outcome["stats"]["shipped_rows"] > 0


@pytest.mark.skipif(DEVICE != "cuda", reason="a setting of CUDA's allocator")
def test_expandable_segments(tmp_path: Path) -> None:
    """PyTorch's memory cannot be shared then; the pool's is the driver's."""
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with _members(tmp_path, 2, "shipped", 1, 5, **setting) as members:
        for outcome in _outcomes(members):
            assert outcome["worst"] < BFLOAT16_ERROR


@pytest.mark.parametrize("mode", ["mapped", _later("streamed"), "shipped"])
def test_what_was_opened_outlives_its_owner(tmp_path: Path, mode: str) -> None:
    """The driver keeps memory that others have opened, also when all that is free is taken."""
    with _members(tmp_path, 2, mode, int(mode != "mapped"), BATCHES // 2) as members:
        members[1].kill()
        members[1].wait()
        taken = _take_free_memory(tmp_path)
        _go_on(members[0])
        outcome = json.loads(_line(members[0]))
        _go_on(members[0])
        assert members[0].wait(60) == 0
    del taken
    assert outcome["worst"] == 0, "shipped layers are run here"
    assert outcome["stats"]["shipped_rows"] == 0


@pytest.mark.parametrize("mode", [_later("streamed"), "shipped"])
def test_memory_is_given_back(tmp_path: Path, mode: str) -> None:
    before = _free_bytes(tmp_path)
    with _members(tmp_path, 2, mode, 1, 5) as members:
        assert _free_bytes(tmp_path) < before
        _outcomes(members)
    assert _free_bytes(tmp_path) >= before


def test_memory_of_killed_processes_is_given_back(tmp_path: Path) -> None:
    """Owners and borrowers in one: each has what others opened, and has opened what others own."""
    before = _free_bytes(tmp_path)
    with _members(tmp_path, 3, "shipped", 1, 5) as members:
        for member in members[:2]:
            member.kill()
            member.wait()
        assert _free_bytes(tmp_path) < before, "the third has opened it"
        members[2].kill()
        members[2].wait()
        assert _free_bytes(tmp_path) >= before


def _free_bytes(run_dir: Path) -> int:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]
    return _fake(run_dir).cudaMemGetInfo()[1]


def _take_free_memory(run_dir: Path) -> object:
    """Bytes of 0xFF in nearly all of the device's free memory."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        free = _free_bytes(run_dir) - 2 * GIB
        return torch.full((free,), 255, dtype=torch.uint8, device=DEVICE)
    runtime = _fake(run_dir)
    num_bytes = _free_bytes(run_dir) - 4 * MIB
    _, address = runtime.cudaMalloc(num_bytes)
    ctypes.memset(address, 255, num_bytes)
    return runtime


def _fake(run_dir: Path) -> FakeRuntime:
    return FakeRuntime(fake_folder(run_dir))
