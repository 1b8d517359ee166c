"""Slots that hold NaN, in every floating type, from the end of a lease to the next copy."""

from __future__ import annotations

from collections.abc import Callable

from elbowroom.pool.housekeeper import Housekeeper
from elbowroom.pool.slots import Slot


def spoil_released_slots(replace: Callable[[type, str, object], None] = setattr) -> None:
    """Have ``Housekeeper.release`` overwrite the slot. ``replace`` works as ``setattr`` does."""
    original = Housekeeper.release

    def release(self: Housekeeper, slot: Slot) -> None:
        slot.buffer.fill_(0xFF)
        original(self, slot)

    replace(Housekeeper, "release", release)
