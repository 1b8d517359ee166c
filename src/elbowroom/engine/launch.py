"""Starts the processes of replicas: their cores, environment and end of the socket pair."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from elbowroom.core import host
from elbowroom.core.gpus import DEVICES_VARIABLE, Gpu
from elbowroom.engine.vllm_seam import ENVIRONMENT
from elbowroom.engine.wire import Channel

REPLICA_COMMAND = (
    sys.executable,
    "-c",
    "import sys; from elbowroom.engine.replica import main; main(int(sys.argv[1]))",
)
"""Not ``-m``: the engine core that vLLM spawns would import that module once more."""

_PRELOADS = (("libiomp5.so",), ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"))
_LIBRARY_FOLDERS = (
    Path(sys.prefix) / "lib",
    Path("/usr/lib/x86_64-linux-gnu"),
    Path("/usr/lib/aarch64-linux-gnu"),
    Path("/usr/lib64"),
    Path("/usr/lib"),
)


@dataclass(frozen=True)
class ReplicaProcess:
    """A replica's process and our end of the channel to it."""

    replica: int
    process: asyncio.subprocess.Process
    channel: Channel


async def start_replica(
    replica: int,
    cores: Sequence[int],
    log: IO[bytes],
    command: Sequence[str] = REPLICA_COMMAND,
    gpus: Sequence[Gpu] = (),
) -> ReplicaProcess:
    """Start one replica on ``cores`` (none: on any); its output goes to ``log``.

    Of ``gpus`` it computes on the first.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *command,
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=replica_environment(len(cores), gpus),
            start_new_session=True,  # a Ctrl-C in the terminal is for the runner to handle
        )
    host.pin(process.pid, cores)
    return ReplicaProcess(replica, process, await Channel.over(ours))


def replica_environment(num_cores: int, gpus: Sequence[Gpu] = ()) -> dict[str, str]:
    """The user's environment, what the engine needs, and its GPUs, or on CPU the OpenMP settings.

    Without GPUs, Intel's OpenMP runtime and tcmalloc are preloaded where they are found.
    """
    environment = {**ENVIRONMENT, **os.environ}
    if gpus:
        environment[DEVICES_VARIABLE] = ",".join(gpu.entry for gpu in gpus)
    elif num_cores:
        environment["OMP_NUM_THREADS"] = str(num_cores)
        found = [_find_library(names) for names in _PRELOADS]
        preloads = [environment.get("LD_PRELOAD", ""), *(str(path) for path in found if path)]
        environment["LD_PRELOAD"] = ":".join(filter(None, preloads))
    return environment


def remove_openmp_leftovers(shared_memory: Path | None = None) -> None:
    """Remove what Intel's OpenMP runtime leaves in shared memory when its process is killed."""
    folder = shared_memory or host.shared_memory_folder()
    for path in folder.glob(f"__KMP_REGISTERED_LIB_*_{host.user_id()}") if folder else ():
        if not host.is_alive(int(path.name.split("_")[-2])):
            path.unlink(missing_ok=True)


def _find_library(names: Sequence[str]) -> Path | None:
    """The first of ``names`` that is in a known folder."""
    paths = (folder / name for name in names for folder in _LIBRARY_FOLDERS)
    return next((path for path in paths if path.exists()), None)
