"""Meter of PyTorch's CPU memory: counts what is held, refuses beyond a budget, logs a step.

It is an allocator in C++, built with g++ against the headers of the installed torch and kept in the
user's cache. ``python -m elbowroom.swap.meter`` builds it ahead of its first use.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from elbowroom.core import host
from elbowroom.core.errors import MeterUnavailableError, one_line
from elbowroom.swap.away import AwayTensor

_SOURCE = Path(__file__).with_name("meter.cpp")
_BUILD_SECONDS = 300
_FUNCTIONS: dict[str, tuple[list[type], type | None]] = {
    "meter_install": ([], None),
    "meter_held": ([], ctypes.c_int64),
    "meter_peak": ([], ctypes.c_int64),
    "meter_reset_peak": ([], None),
    "meter_set_budget": ([ctypes.c_int64], None),
    "meter_num_refused": ([], ctypes.c_int64),
    "meter_block_bytes": ([ctypes.c_int64], ctypes.c_int64),
    "meter_block_number": ([ctypes.c_int64], ctypes.c_int64),
    "meter_num_allocated": ([], ctypes.c_int64),
    "meter_start_log": ([], None),
    "meter_stop_log": ([], None),
    "meter_mark": ([], ctypes.c_int64),
    "meter_num_entries": ([], ctypes.c_int64),
    "meter_read_log": ([ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], None),
}


class MeterLog(NamedTuple):
    """What the allocator did: ``deltas`` (bytes; 0 for marks) and ``addresses``, both int64."""

    deltas: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]


class Meter:
    """The allocator, installed in this process for good; one for all threads.

    Only blocks allocated since it was installed are counted. Use ``installed_meter``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (takes, gives) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = takes, gives
        self._library = library
        library.meter_install()

    @property
    def held_bytes(self) -> int:
        return int(self._library.meter_held())

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once since ``reset_peak``."""
        return int(self._library.meter_peak())

    @property
    def num_refused(self) -> int:
        """Allocations refused so far because of a budget."""
        return int(self._library.meter_num_refused())

    def reset_peak(self) -> None:
        self._library.meter_reset_peak()

    @contextmanager
    def budget(self, num_bytes: int | None) -> Iterator[None]:
        """Refuse, inside the block, whatever would make more than ``num_bytes`` held.

        What is refused raises torch.OutOfMemoryError at the allocation; nothing is lost, and the
        process may go on. None refuses nothing. Budgets do not nest.
        """
        self._library.meter_set_budget(-1 if num_bytes is None else max(0, num_bytes))
        try:
            yield
        finally:
            self._library.meter_set_budget(-1)

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage's memory is among the held bytes."""
        return bool(self._library.meter_block_bytes(storage.data_ptr()))

    def older(self) -> Callable[[torch.UntypedStorage], bool]:
        """Tells storages that are there now from those that are made later."""
        num_allocated = int(self._library.meter_num_allocated())

        def is_older(storage: torch.UntypedStorage) -> bool:
            number = int(self._library.meter_block_number(storage.data_ptr()))
            return number <= num_allocated  # 0 for what others have allocated

        return is_older

    def address(self, storage: torch.UntypedStorage) -> int:
        """The address of a storage's memory, by which the log knows it."""
        return storage.data_ptr()

    def start_log(self) -> None:
        """Begin a new log, and forget the one before."""
        self._library.meter_start_log()

    def mark(self) -> int:
        """Add an entry of 0 bytes to the log. Returns its position."""
        return int(self._library.meter_mark())

    @property
    def num_entries(self) -> int:
        """Length of the log: the position of the next entry."""
        return int(self._library.meter_num_entries())

    def stop_log(self) -> MeterLog:
        """End the log and return it. It is kept until the next one begins."""
        self._library.meter_stop_log()
        return self.log_between(0, self.num_entries)

    def log_between(self, begin: int, end: int) -> MeterLog:
        """The entries from ``begin`` to ``end`` - 1, which may be read while the log goes on."""
        entries = np.zeros((end - begin, 2), dtype=np.int64)
        self._library.meter_read_log(entries.ctypes.data, begin, len(entries))
        return MeterLog(entries[:, 0].copy(), entries[:, 1].copy())


@cache
def installed_meter() -> Meter:
    """The meter of this process; the first call builds it if need be, and installs it.

    Raises MeterUnavailableError where it cannot be built or loaded.
    """
    library = build_meter()
    try:
        return Meter(ctypes.CDLL(str(library)))
    except OSError as error:
        raise MeterUnavailableError(f"the meter {library} cannot be loaded: {error}") from error


def uncounted_bytes(
    meter: Meter, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Bytes of weights, gradients, buffers and optimizer state that the meter does not count.

    They were allocated before it was installed, or by something else than PyTorch's allocator.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if optimizer is not None:
        leaves = [leaf for state in optimizer.state.values() for leaf in state.values()]
        tensors += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = {}
    for storage in _storages(tensors):
        if storage.device.type == "cpu" and not meter.counts(storage):
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that a model's parameters hold here."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return sum({each._cdata: each.nbytes() for each in _storages(gradients)}.values())


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """Storages of what is here, those of the parts of sparse tensors too."""
    for tensor in tensors:
        if isinstance(tensor, AwayTensor):
            continue
        local = getattr(tensor, "_local_tensor", tensor)
        parts = [local]
        if local.layout is torch.sparse_coo:
            parts = [local._indices(), local._values()]
        elif local.layout is not torch.strided:  # compressed: only what it holds most of
            parts = [local.values()]
        for part in parts:
            yield part.untyped_storage()


def build_meter() -> Path:
    """Build the allocator unless the cache has it. Returns the library's path.

    Raises MeterUnavailableError without a compiler, a cache, or headers that fit.
    """
    folder = host.cache_folder()
    if folder is None:
        raise MeterUnavailableError("no meter of memory: set XDG_CACHE_HOME to a folder for it")
    if not sys.platform.startswith("linux"):
        raise MeterUnavailableError(f"no meter on {sys.platform}: it is made for Linux")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    command = _compile_command(compiler or "g++")
    known = hashlib.sha256("\0".join([torch.__version__, *command[1:]]).encode())
    known.update(_SOURCE.read_bytes())
    library = folder / "elbowroom" / f"meter-{known.hexdigest()[:16]}.so"
    if library.exists():
        return library
    if compiler is None:
        raise MeterUnavailableError("no meter of memory: install g++, which builds it once")
    with tempfile.TemporaryDirectory(prefix="elbowroom-meter-") as scratch:
        made = Path(scratch) / library.name
        _compile([*command, "-o", str(made)])
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            beside = library.with_suffix(f".{os.getpid()}")
            shutil.copyfile(made, beside)
            beside.replace(library)
        except OSError as error:
            raise MeterUnavailableError(f"no meter: cannot write {library}: {error}") from error
    return library


def _compile_command(compiler: str) -> list[str]:
    root = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return [
        compiler,
        *("-std=c++20", "-O2", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        f"-I{root / 'include'}",
        str(_SOURCE),
        f"-L{root / 'lib'}",
        "-lc10",
    ]


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
    except subprocess.CalledProcessError as error:
        last = next((line for line in error.stderr.splitlines() if "error" in line), "")
        raise MeterUnavailableError(f"no meter: {command[0]} failed: {last[:200]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeterUnavailableError(f"no meter: {one_line(error)}") from error


if __name__ == "__main__":
    try:
        print(f"meter of memory: {build_meter()}")
    except MeterUnavailableError as error:
        print(error)
