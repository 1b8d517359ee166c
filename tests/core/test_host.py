"""What this process may use, read from file systems as other machines and containers have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elbowroom.core import host

GIB = 2**30
MEMINFO = "MemTotal:       25165824 kB\nMemFree:  1048576 kB\nMemAvailable:   12582912 kB\n"


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def unnarrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say for themselves what the environment allows."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_without_limits(tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/meminfo": MEMINFO})
    assert host.memory_bytes(root) == 24 * GIB
    assert host.free_memory_bytes(root) == 12 * GIB
    assert host.cores(root) == tuple(sorted(os.sched_getaffinity(0)))


V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/jobs/mine\n",
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/fs/cgroup/jobs/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/jobs/memory.current": f"{6 * GIB}\n",
    "sys/fs/cgroup/jobs/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    "sys/fs/cgroup/jobs/mine/memory.max": "max\n",
    "sys/fs/cgroup/jobs/mine/cpu.max": "100000 100000\n",
}
V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/cpu,cpuacct/ignored": "",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
UNLIMITED_V1 = {
    **V1,
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
}


@pytest.mark.parametrize(
    ("files", "total", "free", "num_cores"),
    [(V2, 8, 3, 1), (V1, 4, 3, 1), (UNLIMITED_V1, 24, 12, None)],
    ids=["version 2", "version 1, in a container", "version 1 without limits"],
)
def test_limits_of_control_groups(
    tmp_path: Path, files: dict[str, str], total: int, free: int, num_cores: int | None
) -> None:
    root = system(tmp_path, files)
    assert host.memory_bytes(root) == total * GIB
    assert host.free_memory_bytes(root) == free * GIB
    assert len(host.cores(root)) == (num_cores or len(os.sched_getaffinity(0)))


def test_cores_and_not_the_threads_that_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sockets of two cores of two threads, numbered as Linux does; one thread is not ours."""
    cpu = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {cpu.format(n): f"{n % 4},{n % 4 + 4}\n" for n in range(8)}
    files["sys/devices/system/node/node0/cpulist"] = "0-1,4-5\n"
    files["sys/devices/system/node/node1/cpulist"] = "2-3,6-7\n"
    root = system(tmp_path, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 4, 5, 6, 7})
    assert host.cores(root) == (1, 2, 3, 4)
    assert host.memory_nodes(root) == ((1, 4), (2, 3))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 6})
    assert host.cores(root) == (2,)
    assert host.memory_nodes(root) == ((2,),)


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_getaffinity", "sched_setaffinity", "sysconf", "getuid", "statvfs"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(host, "fcntl", None)
    assert host.memory_bytes(tmp_path) is None
    assert host.free_memory_bytes(tmp_path) is None
    assert host.cores(tmp_path) == tuple(range(os.cpu_count() or 1))
    assert host.memory_nodes(tmp_path) == (host.cores(tmp_path),)
    assert host.shared_memory_folder(tmp_path) is None
    assert host.fastest_dtype("bfloat16", tmp_path) == "bfloat16"
    assert host.free_bytes(tmp_path) == host.user_id() == 0
    assert host.is_alive(1, tmp_path)
    host.pin(0, (0,))
    with (tmp_path / "lock").open("w") as file:
        assert host.try_lock(file.fileno())


@pytest.mark.parametrize(
    ("flags", "own", "fastest"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "bfloat16", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "float16", "float32"),
        ("flags\t\t: fpu avx2", "bfloat16", "float32"),
        ("flags\t\t: fpu avx2 avx512f", "bfloat16", "float32"),
        ("flags\t\t: fpu amx_bf16", "bfloat16", "bfloat16"),
        ("flags\t\t: fpu avx2", "float32", "float32"),
        ("Features\t: fp asimd asimdhp bf16", "bfloat16", "bfloat16"),
        ("Features\t: fp asimd asimdhp", "float16", "float16"),
        ("Features\t: fp asimd", "bfloat16", "float32"),
    ],
)
def test_the_fastest_dtype_that_loses_nothing(
    tmp_path: Path, flags: str, own: str, fastest: str
) -> None:
    root = system(tmp_path, {"proc/cpuinfo": f"processor : 0\n{flags}\n"})
    assert host.fastest_dtype(own, root) == fastest


@pytest.mark.parametrize(
    ("name", "value", "fastest"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "float32"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "bfloat16"),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", "bfloat16"),
        ("ATEN_CPU_CAPABILITY", "avx2", "float32"),
        ("ATEN_CPU_CAPABILITY", "avx512", "bfloat16"),
        ("ATEN_CPU_CAPABILITY", "default", "float32"),
    ],
)
def test_an_environment_that_forbids_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, fastest: str
) -> None:
    root = system(tmp_path, {"proc/cpuinfo": "flags : avx512f avx512_bf16\n"})
    monkeypatch.setenv(name, value)
    assert host.fastest_dtype("bfloat16", root) == fastest


def test_locks_are_seen_by_others(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as one, path.open("w") as other:
        assert host.try_lock(one.fileno())
        assert not host.try_lock(other.fileno())
        assert not host.try_lock(other.fileno(), shared=True)
    with path.open("w") as one, path.open("w") as other:
        assert host.try_lock(one.fileno(), shared=True)
        assert host.try_lock(other.fileno(), shared=True)
