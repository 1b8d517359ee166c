"""How replicas start: environment, cores, descriptors and process group."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from elbowroom.core.gpus import Gpu
from elbowroom.engine import launch
from elbowroom.engine.launch import replica_environment, start_replica
from elbowroom.engine.vllm_seam import ENVIRONMENT
from elbowroom.engine.wire import Failed


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only place where libraries are looked for."""
    monkeypatch.setattr(launch, "_LIBRARY_FOLDERS", (tmp_path / "none", tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return tmp_path


def test_nothing_leaves_the_machine_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    environment = replica_environment(0)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


def test_what_the_user_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert replica_environment(2)["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_threads_follow_the_cores(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert replica_environment(3)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in replica_environment(0)


def test_libraries_that_are_there_are_preloaded_behind_the_users(
    libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openmp, malloc = libraries / "libiomp5.so", libraries / "libtcmalloc.so.4"
    openmp.touch()
    malloc.touch()
    assert replica_environment(1)["LD_PRELOAD"] == f"{openmp}:{malloc}"
    monkeypatch.setenv("LD_PRELOAD", "/mine.so")
    assert replica_environment(1)["LD_PRELOAD"] == f"/mine.so:{openmp}:{malloc}"
    assert replica_environment(0)["LD_PRELOAD"] == "/mine.so"


def test_without_libraries_nothing_is_preloaded(libraries: Path) -> None:
    assert replica_environment(1).get("LD_PRELOAD", "") == ""


def test_a_replica_computes_on_its_own_gpu_first(libraries: Path) -> None:
    (libraries / "libiomp5.so").touch()
    gpus = [Gpu(f"GPU-{number}", "NVIDIA H100", 80 << 30, 80 << 30) for number in (1, 0)]
    environment = replica_environment(4, gpus)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-0"
    assert environment.get("LD_PRELOAD", "") == "", "that is for engines on CPUs"


def test_our_own_environment_is_not_changed(libraries: Path) -> None:
    before = dict(os.environ)
    replica_environment(4)
    assert dict(os.environ) == before


_TELL = """
import json, os, socket, struct, sys, time
end = time.monotonic() + 10
while len(os.sched_getaffinity(0)) > 1 and time.monotonic() < end:
    time.sleep(0.01)  # it is pinned from outside, a moment after it began
sock = socket.socket(fileno=int(sys.argv[1]))
facts = {
    "cores": sorted(os.sched_getaffinity(0)),
    "leads_group": os.getpgid(0) == os.getpid(),
    "stdin": sys.stdin.read(),
}
print("to the log")
print("errors too", file=sys.stderr)
data = json.dumps({"type": "Failed", "error": json.dumps(facts)}).encode()
sock.sendall(struct.pack("<I", len(data)) + data)
sock.recv(1)
os.sched_getaffinity(0)
"""


def test_a_started_process(tmp_path: Path, libraries: Path) -> None:
    core = min(os.sched_getaffinity(0))

    async def start() -> None:
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-c", _TELL]
            started = await start_replica(4, [core], log, command)
        told = await started.channel.receive()
        assert started.replica == 4
        assert isinstance(told, Failed)
        assert json.loads(told.error) == {"cores": [core], "leads_group": True, "stdin": ""}
        started.channel.close()
        assert await asyncio.wait_for(started.process.wait(), 10) == 0, "the end is not seen"

    asyncio.run(start())
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["errors too", "to the log"]


def test_the_end_of_a_process_is_seen_at_once(tmp_path: Path) -> None:
    async def start() -> None:
        with (tmp_path / "log").open("wb") as log:
            started = await start_replica(0, [], log, [sys.executable, "-c", "pass"])
        assert await asyncio.wait_for(started.channel.receive(), 10) is None
        started.channel.close()
        await started.process.wait()

    asyncio.run(start())


def test_openmp_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / f"__KMP_REGISTERED_LIB_4194304_{os.getuid()}"  # above the largest pid
    alive = tmp_path / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}"
    for path in (dead, alive, tmp_path / "other"):
        path.touch()
    launch.remove_openmp_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "other"])
