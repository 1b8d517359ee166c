"""Checks of swap plans: what could not be carried out is refused when a plan is made or read."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING

from elbowroom.core.errors import InputError, shown
from elbowroom.core.values import check_flag, check_whole

if TYPE_CHECKING:
    from elbowroom.plans.swap import Recomputed, SwapPlan, Transfer


_MOST = 2**62
_MOST_THREADS = 4096


def check_numbers(plan: SwapPlan) -> None:
    """Raise InputError for values of another type, or out of range."""
    for name in ("num_ticks", "smallest_bytes", "static_bytes", "held_gradient_bytes"):
        check_whole(name, getattr(plan, name), _MOST)
    check_whole("num_threads", plan.num_threads, _MOST_THREADS, 1)
    if plan.budget_bytes is not None:
        check_whole("budget_bytes", plan.budget_bytes, _MOST, 1)
    for name in ("compute_seconds", "seconds"):
        value = getattr(plan, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < inf:
            raise InputError(f"{name} is {shown(value)}: give a number that is not negative")
    for peak in plan.tick_peaks:
        check_whole("a number of tick_peaks", peak, _MOST, -_MOST)
    for number, storage in enumerate(plan.storages):
        check_whole(f"num_bytes of storage {number}", storage.num_bytes, _MOST)
        ticks = (*storage.pack_ticks, *(() if storage.use_tick is None else (storage.use_tick,)))
        for tick in ticks:
            check_whole(f"a tick of storage {number}", tick, plan.num_ticks)
        if not storage.pack_ticks or list(storage.pack_ticks) != sorted(set(storage.pack_ticks)):
            raise InputError(f"pack_ticks of storage {number} must ascend, and not be empty")
    for choice in plan.choices:
        check_whole("a choice's storage", choice.storage, _MOST)
    for swapped in plan.swapped:
        check_whole(f"drop of storage {swapped.storage}", swapped.drop, _MOST)
        if swapped.bring is not None:
            check_whole(f"bring of storage {swapped.storage}", swapped.bring, _MOST)
    if not isinstance(plan.tier, str):
        raise InputError(f"tier is {shown(plan.tier)}: give a folder's name, or an empty one")
    check_flag("swaps_optimizer", plan.swaps_optimizer)


def check_choices(plan: SwapPlan) -> None:
    """Raise InputError unless each choice drops after the pack and brings before the use."""
    numbers = [choice.storage for choice in plan.choices]
    if numbers != sorted(set(numbers)):
        raise InputError("the plan's choices must ascend by storage, one for each")
    if outside := [number for number in numbers if not 0 <= number < len(plan.storages)]:
        raise InputError(f"the plan swaps storage {outside[0]} of {len(plan.storages)}")
    for recomputed in plan.recomputed:
        _check_recomputed(plan, recomputed)
    for choice in plan.swapped:
        storage = plan.storages[choice.storage]
        last = storage.use_tick if storage.use_tick is not None else plan.num_ticks
        if not storage.pack_tick <= choice.drop <= last:
            raise InputError(
                f"storage {choice.storage} is dropped at tick {choice.drop}: it is saved at "
                f"{storage.pack_tick} and used at {last}"
            )
        if (choice.bring is None) != (storage.use_tick is None):
            raise InputError(
                f"storage {choice.storage} is brought at {choice.bring}, used at {storage.use_tick}"
            )
        last = plan.need_ticks.get(choice.storage, last)
        if choice.bring is not None and not choice.drop <= choice.bring <= last:
            raise InputError(
                f"storage {choice.storage} is brought at tick {choice.bring}: it is dropped at "
                f"{choice.drop} and used at {last}"
            )


def _check_recomputed(plan: SwapPlan, choice: Recomputed) -> None:
    """Raise InputError unless all that a recipe reads is there when it is replayed."""
    made, remade = plan.storages[choice.storage], {each.storage for each in plan.recomputed}
    if made.use_tick is None:
        raise InputError(f"storage {choice.storage} is recomputed, but it is never asked for")
    for number in choice.recipe.sources:
        if not 0 <= number < len(plan.storages):
            raise InputError(
                f"storage {choice.storage} is made from storage {number} of {len(plan.storages)}"
            )
        source = plan.storages[number]
        if number in remade:
            raise InputError(
                f"storage {choice.storage} is made from storage {number}, which is recomputed "
                "itself: keep that one, or swap it"
            )
        if source.pack_tick >= made.pack_tick or source.use_tick is None:
            raise InputError(
                f"storage {choice.storage} is made from storage {number}, which must be saved "
                "before it and used by the backward"
            )


def check_transfers(plan: SwapPlan, expected: Iterable[Transfer]) -> None:
    """Raise InputError for a transfer too many or too few, or in an order that cannot be kept.

    The link must never wait for a transfer that the main thread has yet to ask for, while the main
    thread waits for one that stands behind it. ``expected`` are the transfers of its choices.
    """
    wanted = set(expected)
    swapped = {choice.storage: choice for choice in plan.swapped}
    if len(plan.transfers) != len(wanted) or set(plan.transfers) != wanted:
        odd = wanted.symmetric_difference(plan.transfers)
        names = ", ".join(sorted(map(str, odd))[:6]) or "one is listed twice"
        raise InputError(f"the plan's transfers do not fit its choices: {names}")
    latest, behind = (-1, -1), ""
    for transfer in plan.transfers:
        choice, storage = swapped[transfer.storage], plan.storages[transfer.storage]
        if transfer.direction == "out":
            asked = (storage.pack_tick, 2)
            at_once = choice.drop == storage.pack_tick
            awaited = (choice.drop, 3 if at_once else 0)
        else:
            assert choice.bring is not None
            asked, awaited = (choice.bring, 1), (plan.need_ticks[transfer.storage], 3)
        if asked > latest:
            latest, behind = asked, str(transfer)
        if latest > awaited:
            raise InputError(
                f"{transfer} stands behind {behind}, which is asked for at tick {latest[0]}, but "
                f"it is waited for at tick {awaited[0]}: list it earlier"
            )
