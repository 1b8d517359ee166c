"""Checksums tell bytes apart that differ in a bit, in their order, or in their number."""

from __future__ import annotations

import random

import pytest
import torch

from elbowroom.swap.checksum import checksum


def of(tensor: torch.Tensor) -> int:
    return checksum(tensor.untyped_storage())


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 32768, 32769, 100_003])
def test_every_changed_byte_is_seen(size: int) -> None:
    generator, rng = torch.Generator().manual_seed(size), random.Random(size)
    bytes_ = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    before = of(bytes_)
    assert of(bytes_.clone()) == before
    for place in {0, size - 1, *(rng.randrange(size) for _ in range(50))}:
        changed = bytes_.clone()
        changed[place] ^= 1 << rng.randrange(8)
        assert of(changed) != before


def test_the_order_of_blocks_and_the_length_are_seen() -> None:
    values = torch.arange(3 * 4096, dtype=torch.int64)
    blocks = values.view(3, 4096)
    sums = {of(blocks[list(order)].clone()) for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0))}
    assert len(sums) == 3
    assert of(torch.ones(4096)) != of(torch.ones(4100))
    assert of(torch.empty(0)) == 0
