"""Machine resources that this process may use: cores, memory, shared memory, locks.

This is the one module that uses what Linux has and other systems lack (``sched_getaffinity``,
``fcntl``, ``/proc``, control groups). Where something is missing, functions return the best answer
they can; nothing here raises because of it. Functions that read system files take the root of the
file system, so that tests can give their own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ROOT = Path("/")
_PR_SET_PDEATHSIG = 1
_BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags in ``/proc/cpuinfo``, x86-64's and Arm's, of CPUs with instructions for bfloat16.

Those for float16 follow.
"""

_FP16_INSTRUCTIONS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})
_ISAS = {
    "ONEDNN_MAX_CPU_ISA": ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"),
    "DNNL_MAX_CPU_ISA": ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"),
    "ATEN_CPU_CAPABILITY": ("AVX512", "AMX", "SVE"),
}
"""Environment variables that restrict the instructions of oneDNN and PyTorch.

Each comes with the parts of values that still allow instructions for 16-bit numbers.
"""

_UNLIMITED_BYTES = 1 << 60
"""Threshold for "no limit": control groups of version 1 write a number near 2^63."""


def cores(root: Path = _ROOT) -> tuple[int, ...]:
    """The cores that this process may run on, limited to what its CPU quota pays for.

    Of logical CPUs that share a core, only the first is listed: two threads of matrix products
    would only wait for each other.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    taken: set[int] = set()
    physical = []
    for cpu in allowed:
        if cpu not in taken:
            physical.append(cpu)
            topology = root / "sys" / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
            taken |= _id_list(topology / "thread_siblings_list")
    quota = _cpu_quota(root)
    return tuple(physical if quota is None else physical[: max(1, ceil(quota))])


def memory_nodes(root: Path = _ROOT) -> tuple[tuple[int, ...], ...]:
    """Usable cores grouped by NUMA node; one group where the system does not tell."""
    ours = cores(root)
    folders = sorted((root / "sys" / "devices" / "system" / "node").glob("node[0-9]*"))
    lists = [_id_list(folder / "cpulist") for folder in folders]
    groups = [tuple(core for core in ours if core in of_node) for of_node in lists]
    found = tuple(group for group in groups if group)
    return found if sum(map(len, found)) == len(ours) else (ours,)


def cpu_name(root: Path = _ROOT) -> str:
    """The CPU's model name, or the machine type where the system does not tell."""
    for line in _lines(root / "proc" / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def pin(pid: int, cores: Sequence[int]) -> None:
    """Pin a process (0 is this one) to ``cores``, where the system can."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, cores)


def memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory of this machine or container in bytes; None where the system does not tell."""
    known = [_meminfo(root).get("MemTotal"), *(limit for limit, _ in _memory_groups(root))]
    if known[0] is None and hasattr(os, "sysconf"):  # macOS
        with suppress(ValueError, OSError):
            known[0] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((size for size in known if size is not None), default=None)


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """Bytes available without swapping, within this container's limit too; None where unknown."""
    known = [_meminfo(root).get("MemAvailable")]
    known += [max(0, limit - used) for limit, used in _memory_groups(root)]
    return min((size for size in known if size is not None), default=None)


def shared_memory_folder(root: Path = _ROOT) -> Path | None:
    """The writable folder whose files live in memory (``/dev/shm``); None if there is none."""
    folder = root / "dev" / "shm"
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written below ``folder``; 0 where the system does not tell."""
    if not hasattr(os, "statvfs"):
        return 0
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def user_id() -> int:
    """User id, for names of shared files; 0 on systems without one."""
    return os.getuid() if hasattr(os, "getuid") else 0


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends, however it ends (Linux only).

    If the parent has ended already, the process is killed at once; this is only noticed if
    ``parent`` gives the parent's id.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid: int, root: Path = _ROOT) -> bool:
    """Whether the process ``pid`` exists; True where the system does not tell."""
    processes = root / "proc"
    return (processes / str(pid)).exists() or not (processes / "self").exists()


def cache_folder() -> Path | None:
    """The user's folder for files that can be made again; None without a home."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user that the system does not know
        return None


def temporary_folder() -> Path:
    return Path(tempfile.gettempdir())


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False if another process holds the lock.

    The lock lasts until the descriptor is closed or this process dies. On systems without file
    locks the answer is always True: nothing guards against a second process there.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def fastest_dtype(own: str, root: Path = _ROOT) -> str:
    """The dtype in which this CPU computes a model of dtype ``own`` fastest without losing digits.

    Without instructions for them, products in bfloat16 or float16 take several times as long as in
    float32, which holds every value of both. Returns ``own`` where the system does not tell.
    """
    instructions = {"bfloat16": _BF16_INSTRUCTIONS, "float16": _FP16_INSTRUCTIONS}.get(own)
    flags = _cpu_flags(root)
    if instructions is None or not flags:
        return own
    return own if instructions & flags and not _is_narrowed() else "float32"


def _is_narrowed() -> bool:
    """Whether environment variables forbid instructions for 16-bit numbers."""
    values = {name: os.environ.get(name, "").upper() for name in _ISAS}
    return any(
        value and not any(part in value for part in _ISAS[name]) for name, value in values.items()
    )


def _cpu_flags(root: Path) -> frozenset[str]:
    for line in _lines(root / "proc" / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _meminfo(root: Path) -> dict[str, int]:
    """The entries of ``/proc/meminfo`` in bytes, by name."""
    found = {}
    for line in _lines(root / "proc" / "meminfo"):
        name, _, value = line.partition(":")
        if value.split()[1:] == ["kB"]:
            found[name] = 1024 * int(value.split()[0])
    return found


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of every control group around this process that has a limit.

    Inactive file cache is not counted as used: the kernel gives it up first.
    """
    for folder in _groups(root, "memory"):
        for limit, use in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _number(folder / limit), _number(folder / use)
            if most is not None and used is not None and most < _UNLIMITED_BYTES:
                yield most, max(0, used - _inactive_files(folder))


def _inactive_files(folder: Path) -> int:
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _cpu_quota(root: Path) -> float | None:
    """CPU quota of this process's control groups, in cores; None without a limit."""
    quotas = []
    for folder in _groups(root, "cpu"):
        words = next(iter(_lines(folder / "cpu.max")), "").split()
        if len(words) == 2 and words[0].isdecimal():
            quotas.append(int(words[0]) / int(words[1]))
        quota = _number(folder / "cpu.cfs_quota_us")
        period = _number(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups around this process, from its own to the outermost.

    Inside a container its own group looks like the outermost one, and the path it is told may not
    exist.
    """
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        folder = top / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top))


def _id_list(path: Path) -> set[int]:
    """The numbers in a file that lists them like ``0-3,8``."""
    numbers: set[int] = set()
    with suppress(ValueError):
        for part in next(iter(_lines(path)), "").split(","):
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    try:
        return int(text)
    except ValueError:  # "max"
        return None


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
