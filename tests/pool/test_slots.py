"""The states of slots, and what each side of them is told."""

from __future__ import annotations

import threading
import time

import pytest

from elbowroom.core.errors import PoolError
from elbowroom.pool.slots import Slot, Slots, SlotState

ONE = {1: 0, 2: 0, 3: 0}
TWO = {1: 0, 2: 1}


def _filled(slots: Slots, layer: int) -> Slot:
    slot = slots.reserve(layer, slots.epoch)
    assert slot is not None
    slots.mark_ready(slot, slots.epoch)
    return slot


def test_a_slot_goes_through_its_states() -> None:
    slots = Slots(ONE, 8)
    slot = slots.reserve(3, slots.epoch)
    assert slot is not None
    assert (slot.state, slot.layer) == (SlotState.FILLING, 3)
    slots.check_integrity()
    slots.mark_ready(slot, slots.epoch)
    assert slot.state is SlotState.READY
    assert slots.wait_ready(3, 0) is slot
    assert slot.state is SlotState.IN_USE
    slots.release(slot)
    assert (slot.state, slot.layer) == (SlotState.FREE, None)
    slots.check_integrity()


def test_reserve_waits_for_a_free_slot() -> None:
    slots = Slots(ONE, 8)
    _filled(slots, 1)
    got: list[Slot | None] = []
    thread = threading.Thread(target=lambda: got.append(slots.reserve(2, slots.epoch)))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "no slot was free"
    slots.release(slots.wait_ready(1, 1))
    thread.join(5)
    assert got[0] is not None
    assert got[0].layer == 2


def test_a_layer_never_has_two_slots() -> None:
    slots = Slots(TWO, 8)
    _filled(slots, 1)
    thread = threading.Thread(target=slots.reserve, args=(1, slots.epoch), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "layer 1 still has its slot of the pass before"
    slots.check_integrity()
    slots.close()
    thread.join(5)
    assert not thread.is_alive()


def test_wait_times_out_with_the_state_of_the_slots() -> None:
    slots = Slots(TWO, 8)
    _filled(slots, 1)
    start = time.monotonic()
    with pytest.raises(PoolError, match=r"layer 2 was not streamed within 0\.05 s .*ready layer 1"):
        slots.wait_ready(2, 0.05)
    assert time.monotonic() - start < 2


def test_failure_reaches_the_waiter() -> None:
    slots = Slots(ONE, 8)
    cause = OSError("the owner's memory is gone")
    timer = threading.Timer(0.05, slots.fail, [cause])
    timer.start()
    start = time.monotonic()
    with pytest.raises(PoolError, match="the owner's memory is gone") as caught:
        slots.wait_ready(1, 30)
    assert caught.value.__cause__ is cause
    assert time.monotonic() - start < 5


def test_restart_drops_what_was_fetched_ahead() -> None:
    slots = Slots({1: 0, 2: 1, 3: 2, 4: 2}, 8)
    in_use = slots.wait_ready(_filled(slots, 1).layer or 0, 1)
    ready = _filled(slots, 2)
    filling, epoch = slots.reserve(3, slots.epoch), slots.epoch
    assert filling is not None
    slots.restart()
    assert ready.state is SlotState.FREE
    assert in_use.state is SlotState.IN_USE
    assert slots.reserve(4, epoch) is None, "the old order is over"
    slots.mark_ready(filling, epoch)
    assert filling.state is SlotState.FREE, "a layer of the old order must not be used"
    slots.check_integrity()


def test_restart_and_close_wake_the_housekeeper() -> None:
    for wake in (Slots.restart, Slots.close):
        slots = Slots(ONE, 8)
        _filled(slots, 1)
        slots.wait_ready(1, 1)
        got: list[Slot | None] = []
        thread = threading.Thread(target=lambda g, s: g.append(s.reserve(2, 0)), args=(got, slots))
        thread.start()
        wake(slots)
        thread.join(5)
        assert got == [None]


def test_release_of_a_slot_that_is_not_in_use() -> None:
    slots = Slots(ONE, 8)
    slot = _filled(slots, 1)
    with pytest.raises(PoolError, match="slot 0 released while ready"):
        slots.release(slot)


def test_integrity_notices_torn_states() -> None:
    slots = Slots(TWO, 8)
    one, two = _filled(slots, 1), _filled(slots, 2)
    two.layer = 1
    with pytest.raises(PoolError, match="inconsistent"):
        slots.check_integrity()
    two.layer = 2
    slots.check_integrity()
    one.layer = None
    with pytest.raises(PoolError, match="inconsistent"):
        slots.check_integrity()
