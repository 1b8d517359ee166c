"""One of two processes that convolve with torch's DTensor, for a test.

``FOLDER NUMBER DIM ...``: for one ``DIM`` after the other, writes to ``FOLDER/NUMBER-DIM.json``
whether the output and all gradients of a convolution whose input is split along it are those of one
process, or what it raised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name)
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

NUM_PROCESSES = 2


def main(folder: Path, number: int, dims: list[int]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=number,
        world_size=NUM_PROCESSES,
    )
    for dim in dims:
        try:
            found = {"is_right": is_right(dim)}
        except Exception as error:
            found = {"is_right": False, "raised": repr(error)}
        (folder / f"{number}-{dim}.json").write_text(json.dumps(found))


def is_right(dim: int) -> bool:
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    torch.manual_seed(0)
    whole = [torch.randn(4, 3, 8, 8).double(), torch.randn(5, 3, 3, 3).double()]
    direction = torch.randn(4, 5, 8, 8).double()
    inputs = [each.clone().requires_grad_() for each in whole]
    plain = F.conv2d(*inputs, padding=1)
    wanted = torch.autograd.grad(plain, inputs, direction)

    placements = [[Shard(dim)], [Replicate()]]
    split = [
        distribute_tensor(each, mesh, placement).requires_grad_()
        for each, placement in zip(whole, placements, strict=True)
    ]
    output = F.conv2d(*split, padding=1)
    if not _equal(plain, output):
        return False
    assert isinstance(output, DTensor)
    gradients = torch.autograd.grad(
        output, split, distribute_tensor(direction, mesh, output.placements)
    )
    return all(map(_equal, wanted, gradients))


def _equal(plain: Tensor, split: Tensor) -> bool:
    assert isinstance(split, DTensor)
    full = split.full_tensor()
    return plain.shape == full.shape and torch.allclose(plain, full, atol=1e-12)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), list(map(int, sys.argv[3:])))
