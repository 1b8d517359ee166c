"""NVIDIA GPUs that this process may use, as the driver's own tool tells: no library is loaded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from elbowroom.core.units import MIB

DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
_FIELDS = "index,uuid,name,memory.total,memory.free"
_SECONDS = 20.0
"""How long the driver may take: without its persistence daemon it starts each GPU anew."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``entry`` is its name in ``CUDA_VISIBLE_DEVICES``."""

    entry: str
    name: str
    memory_bytes: int
    free_bytes: int


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order of ``CUDA_VISIBLE_DEVICES``.

    None where no driver answers. An entry may be a number, as nvidia-smi counts, or the beginning
    of a UUID. Parts of a GPU
    (MIG) are not found.
    """
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    answer = ""
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=True
        ).stdout
    gpus: list[tuple[str, Gpu]] = []
    for line in answer.splitlines():
        with suppress(ValueError):  # a field that the driver does not know is "[N/A]"
            index, uuid, name, total, free = (field.strip() for field in line.split(","))
            gpus.append((index, Gpu(uuid, name, int(total) * MIB, int(free) * MIB)))
    visible = os.environ.get(DEVICES_VARIABLE)
    if visible is None:
        return tuple(gpu for _, gpu in gpus)
    found = []
    for entry in filter(None, map(str.strip, visible.split(","))):
        named = [g for index, g in gpus if entry == index or g.entry.startswith(entry)]
        if not named:  # CUDA, too, ignores what comes after an entry that names nothing
            break
        found.append(named[0])
    return tuple(found)


def in_order_of(replica: int, num_each: int, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """All GPUs, those of one replica first: it computes on the first ``num_each``.

    Replicas beyond the number of GPUs share them, in turn.
    """
    first = replica * num_each % len(gpus)
    return (*gpus[first:], *gpus[:first])
