"""A link that fails, dies, hangs or corrupts is noticed by the step that uses it."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from elbowroom.core.errors import StepChangedError, SwapError, TierFullError
from elbowroom.planning.swap.choose import make_plan
from elbowroom.planning.swap.memory import floor_choices
from elbowroom.plans.swap import Transfer
from elbowroom.swap.link import Copy, Link, Turns
from elbowroom.swap.tier import MemoryTier, Slot
from tests.swap.models import Case, make
from tests.swap.steps import assert_same, plain_step, profiled, swapped_step

CAPACITY = 1 << 26


class BrokenTier(MemoryTier):
    """Reads fail after some."""

    def __init__(self, num_good: int, failure: BaseException) -> None:
        super().__init__(CAPACITY)
        self.num_good, self.failure = num_good, failure

    def read(self, slot: Slot, address: int, num_bytes: int) -> None:
        self.num_good -= 1
        if self.num_good < 0:
            raise self.failure
        super().read(slot, address, num_bytes)


class FlippingTier(MemoryTier):
    """Changes one bit of the n-th storage that is written."""

    def __init__(self, number: int) -> None:
        super().__init__(CAPACITY)
        self.number = number

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        changed = bytearray(ctypes.string_at(address, num_bytes))
        changed[num_bytes // 2] ^= 4 if self.number == 0 else 0
        self.number -= 1
        from_changed = (ctypes.c_char * num_bytes).from_buffer(changed)
        super().write(slot, ctypes.addressof(from_changed), num_bytes)


class HangingTier(MemoryTier):
    """Writes never end until they are let."""

    def __init__(self) -> None:
        super().__init__(CAPACITY)
        self.may_go = threading.Event()

    def write(self, slot: Slot, address: int, num_bytes: int) -> None:
        self.may_go.wait(30)


@pytest.mark.parametrize("failure", [OSError("gone"), KeyboardInterrupt(), MemoryError()])
def test_the_step_ends_with_what_made_the_link_fail(
    one_thread: None, failure: BaseException
) -> None:
    link = Link(BrokenTier(3, failure))
    with pytest.raises(SwapError) as caught:
        swapped_step(make("cnn"), link, None)
    assert caught.value.__cause__ is failure
    with pytest.raises(SwapError):  # and so does every step after it
        swapped_step(make("cnn"), link, None)
    link.close()


def test_a_closed_link_is_noticed(one_thread: None) -> None:
    link = Link(MemoryTier(CAPACITY))
    link.close()
    with pytest.raises(SwapError, match="closed"):
        swapped_step(make("cnn"), link, None)


def test_a_link_that_hangs_is_given_up(one_thread: None) -> None:
    tier = HangingTier()
    link = Link(tier, timeout_seconds=0.6)
    with pytest.raises(SwapError, match="within"):
        swapped_step(make("cnn"), link, None)
    tier.may_go.set()
    link.close()


def test_a_full_tier_ends_the_step_before_anything_is_lost(one_thread: None) -> None:
    link = Link(MemoryTier(64 * 1024))
    case = make("cnn")
    with pytest.raises(TierFullError, match="64 KiB"):
        swapped_step(case, link, None)
    link.close()


@pytest.mark.parametrize("number", [0, 5])
def test_verify_finds_a_flipped_bit(one_thread: None, number: int) -> None:
    link = Link(FlippingTier(number))
    with pytest.raises(SwapError, match=f"storage {number} .*came back changed"):
        swapped_step(make("cnn"), link, None, verify=True)
    link.close()


def test_a_bandwidth_holds_copies_back(one_thread: None) -> None:
    link = Link(MemoryTier(CAPACITY), bytes_per_second=10e6)
    outcome = swapped_step(make("cnn"), link, None)
    moved = outcome.counts.out_bytes + outcome.counts.in_bytes
    assert link.busy_seconds >= moved / 10e6
    link.close()


def smaller(case: Case) -> Case:
    return Case(case.model, case.inputs[:2].clone(), case.targets[:2].clone())


def test_a_step_that_differs_is_noticed_at_its_first_pack_and_swapped_from_there(
    link: Link,
) -> None:
    case = make("cnn")
    plain_step(case)
    profile = profiled(case, link)
    plan = make_plan(profile, ())  # all is kept
    plain = plain_step(smaller(case))
    outcome = swapped_step(smaller(case), link, plan)
    assert_same(plain, outcome)
    assert "tick 0" in outcome.counts.change
    num_candidates = len(profile.storages)
    # The first pack is part of what differs: all that follows leaves.
    assert outcome.counts.num_swapped >= num_candidates - 2
    with pytest.raises(StepChangedError, match="tick 0"):
        swapped_step(smaller(case), link, plan, on_change="raise")


def test_a_backward_that_differs_is_noticed(link: Link) -> None:
    case = make("transformer")
    plain_step(case)
    profile = profiled(case, link)
    plan = make_plan(profile, floor_choices(profile))

    class Frozen(Case):
        def loss(self) -> torch.Tensor:
            loss = super().loss()
            x = self.model.head.weight
            torch.autograd.grad(loss, x, retain_graph=True)
            return loss

    other = Frozen(case.model, case.inputs, case.targets)
    plain = plain_step(case)
    outcome = swapped_step(other, link, plan)
    assert_same(plain, outcome)


def test_copies_go_in_the_order_of_the_plan_unless_somebody_waits(one_thread: None) -> None:
    seen: list[int] = []

    class NotingTier(MemoryTier):
        def write(self, slot: Slot, address: int, num_bytes: int) -> None:
            seen.append(num_bytes)

    link = Link(NotingTier(CAPACITY))
    order = [Transfer("out", n) for n in (2, 0, 1, 3)]
    turns = Turns(link, order)
    copies = {}
    for n in range(4):
        storage = torch.empty(n + 1, dtype=torch.uint8).untyped_storage()
        copies[n] = Copy("out", storage, link.tier.take(n + 1))
    turns.ask(Transfer("out", 0), copies[0])
    turns.ask(Transfer("out", 1), copies[1])
    turns.wait(Transfer("out", 1), copies[1])  # goes first, though it is third
    turns.ask(Transfer("out", 2), copies[2])
    turns.ask(Transfer("out", 3), copies[3])
    turns.wait(Transfer("out", 3), copies[3])
    link.close()
    assert seen == [2, 3, 1, 4]
