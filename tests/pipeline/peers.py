"""One of some processes that talk to each other, for tests.

python -m tests.pipeline.peers NAME FOLDER WORKER SIZE
"""

from __future__ import annotations

import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from elbowroom.pipeline.links import Links


def lets_go_of_what_was_sent(number: int, size: int) -> None:
    """Long before the end."""
    links, other = Links((1 - number,)), 1 - number
    memory = [np.full(50, float(k)) for k in range(20)]
    for label, array in enumerate(memory):
        links.send(other, label, (torch.from_numpy(array),))
    for label, array in enumerate(memory):
        message = links.receive(other)
        assert message.label == label
        assert torch.equal(message.tensors[0], torch.from_numpy(array))
        links.give_back(other, message)
    sent = [weakref.ref(array) for array in memory]
    del memory, array
    ends = time.monotonic() + 20
    while any(one() is not None for one in sent):
        assert time.monotonic() < ends
        time.sleep(0.01)
    links.close((other,))


def main(name: str, folder: Path, number: int, size: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    distributed.init_process_group("gloo", init_method=meet, rank=number, world_size=size)
    globals()[name](number, size)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
