"""Slow tiers give back what they were given, reuse their room, and say when it is used up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elbowroom.core.errors import InputError, TierFullError
from elbowroom.swap.tier import FileTier, MemoryTier, Tier

MIB = 1 << 20


@pytest.fixture(params=["file", "memory"])
def make_tier(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Tier]:
    if request.param == "file":
        return lambda capacity: FileTier(tmp_path, capacity)
    return MemoryTier


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 4 * MIB, 9 * MIB + 5])
def test_bytes_come_back_as_they_went(make_tier: Callable[[int], Tier], num_bytes: int) -> None:
    tier = make_tier(64 * MIB)
    data = [torch.randint(256, (num_bytes,), dtype=torch.uint8) for _ in range(2)]
    slots = [tier.take(num_bytes) for _ in data]
    for slot, values in zip(slots, data, strict=True):
        tier.write(slot, values.data_ptr(), num_bytes)
    for slot, values in zip(reversed(slots), reversed(data), strict=True):
        back = torch.zeros(num_bytes + 1, dtype=torch.uint8)
        tier.read(slot, back.data_ptr(), num_bytes)
        assert torch.equal(back[:-1], values)
        assert back[-1] == 0
    tier.close()


def test_room_is_reused_and_a_full_tier_says_how_much_is_missing(
    make_tier: Callable[[int], Tier],
) -> None:
    tier = make_tier(3 * 4096)
    slots = [tier.take(4000) for _ in range(3)]
    assert len({slot.offset for slot in slots}) == 3
    with pytest.raises(TierFullError, match="12 KiB"):
        tier.take(1)
    tier.give(slots[1])
    assert tier.take(100) == slots[1]
    for slot in slots:
        tier.give(slot)
    assert tier.take(3 * 4096).offset == 0  # what was three slots may be one
    tier.close()


def test_a_file_has_no_name_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tier = FileTier(tmp_path)
    slot = tier.take(100)
    tier.write(slot, torch.zeros(100, dtype=torch.uint8).data_ptr(), 100)
    assert not list(tmp_path.iterdir())
    tier.close()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        FileTier(tmp_path / "nowhere")
