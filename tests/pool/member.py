"""One process of a group, for tests of shared memory: does one thing in a run directory.

    python -m tests.pool.member publish RUN_DIR RANK LAYER NUM_BYTES   then waits for a line
    python -m tests.pool.member allocate RUN_DIR RANK LAYER NUM_BYTES  the same, unpublished
    python -m tests.pool.member run-dir ROOT                           then waits for a line
    python -m tests.pool.member serve RUN_DIR RANK                     the same, runs shipped rows

Prints one line when it has done it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from elbowroom.pool.run_dir import run_directory


def pattern(layer: int, num_bytes: int) -> bytes:
    """Bytes that differ from layer to layer."""
    return bytes((7 * layer + 13 * at) % 251 for at in range(num_bytes))


def main(verb: str, folder: str, *numbers: str) -> None:
    if verb == "run-dir":
        with run_directory(Path(folder)) as path:
            _tell_and_wait(str(path))
        return
    if verb == "serve":
        from tests.pool.test_shipping import server

        with server(Path(folder), int(numbers[0])):
            _tell_and_wait("done")
        return
    import torch

    from elbowroom.pool.shared_memory import SharedMemoryStore

    rank, layer, num_bytes = (int(number) for number in numbers)
    store = SharedMemoryStore(Path(folder), rank)
    buffer = store.allocate(layer, num_bytes)
    buffer.copy_(torch.frombuffer(bytearray(pattern(layer, num_bytes)), dtype=torch.uint8))
    if verb == "publish":
        store.publish(layer)
    _tell_and_wait("done")


def _tell_and_wait(line: str) -> None:
    print(line, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
