"""One step under autograd's hooks for saved tensors, which carry out a swap plan.

The clock is the number of packs and unpacks so far. Every allocation and every drop happens in the
main thread, at the tick that the plan names; the link thread only copies.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from elbowroom.core.errors import StepChangedError
from elbowroom.plans.swap import Choice, Recomputed, Swapped, SwapPlan, Transfer
from elbowroom.swap.candidates import Candidates
from elbowroom.swap.checksum import checksum
from elbowroom.swap.handles import (
    Handle,
    KeptHandle,
    Remaking,
    SavedItem,
    SwappedHandle,
    covers_storage,
    root_of,
)
from elbowroom.swap.link import Copy, CopyLink, Turns
from elbowroom.swap.observer import StepObserver
from elbowroom.swap.recompute import Replay, fixed_tensors
from elbowroom.swap.report import StepCounts

OnChange = Literal["swap", "raise"]

_NEVER = sys.maxsize
"""A tick that does not come."""


@dataclass(eq=False)
class SwappedStep:
    """One step. Enter ``hooks()`` around its forward and backward, and ``end`` it afterwards.

    Handles outlive the step where a graph does: its backward may follow later.

    Args:
        plan: what to keep and when to move the rest; None swaps everything at once.
        link: where storages go; it outlives the step.
        candidates: which saved tensors may leave.
        on_change: what to do when the step does not do what the plan expects.
        verify: compare checksums of what left and what came back.
        observer: whoever measures the step.
        stays: without a plan, which storages are kept; None for none.
        drops_later: without a plan, copy everything away, and drop nothing before ``drop_all``.

    """

    plan: SwapPlan | None
    link: CopyLink
    candidates: Candidates
    on_change: OnChange = "swap"
    verify: bool = False
    observer: StepObserver | None = None
    stays: Callable[[torch.UntypedStorage], bool] | None = None
    drops_later: bool = False
    counts: StepCounts = field(default_factory=StepCounts)

    def __post_init__(self) -> None:
        self._clock = 0
        self._num_items = 0
        self._items: weakref.WeakValueDictionary[int, SavedItem] = weakref.WeakValueDictionary()
        self._by_number: weakref.WeakValueDictionary[int, SavedItem] = weakref.WeakValueDictionary()
        self._drops: dict[int, list[SavedItem]] = {}
        self._turns = Turns(self.link, self.plan.transfers if self.plan else ())
        self._follows = self.plan is not None
        self._replays: dict[int, Replay] = {}
        if self.plan is not None and self.plan.recomputed:
            fixed = fixed_tensors(self.candidates.model)
            for each in self.plan.recomputed:
                self._replays[each.storage] = Replay(each.recipe, fixed)

    def hooks(self) -> AbstractContextManager[None]:
        """The context in which tensors are saved by this step's rules, in this thread only."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def end(self) -> None:
        """Drop what still waits to be dropped. Raises SwapError if the link failed."""
        self._turns.abandon()
        self.drop_all()
        self.link.check()

    def drop_all(self) -> None:
        """Drop all that was saved so far, once it is copied. Raises SwapError."""
        self._drop([item for items in list(self._drops.values()) for item in items])

    def bring_all(self) -> None:
        """Begin to bring all that is away, the last that was saved first. Raises SwapError."""
        for _, item in sorted(self._by_number.items(), reverse=True):
            if item.is_in_tier:
                self._bring(item)

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Drop none of these tensors' storages, whether they are saved before or later."""
        fixed = self.candidates.fix(tensors)
        for items in self._drops.values():
            items[:] = [item for item in items if item.original.cdata not in fixed]

    # Packs.

    def _pack(self, tensor: torch.Tensor) -> Handle:
        tick = self._tick()
        self.counts.num_packs += 1
        storage = self.candidates.storage_of(tensor)
        if storage is None:
            self._check_pack(tick, None, 0)
            handle: Handle = KeptHandle(None, tensor.detach(), tensor._version)
        else:
            handle = self._pack_storage(tick, tensor, storage)
        if self.observer is not None:
            self.observer.tick_ended()
        return handle

    def _pack_storage(
        self, tick: int, tensor: torch.Tensor, storage: torch.UntypedStorage
    ) -> Handle:
        item = self._items.get(storage._cdata)
        is_new = item is None or not item.has(tensor)
        if item is None or is_new:
            self._check_pack(tick, self._num_items, storage.nbytes())
            item = self._new_item(tensor, storage)
        else:
            self._check_pack(tick, item.number, item.num_bytes)
        if self.observer is not None:
            self.observer.packed(item, tick, storage)
        if item.choice is None:
            return self._kept(item, tensor)
        if is_new and item.remaking is None:
            self._send_out(item, tensor)
        offset = int(tensor.storage_offset())
        handle = SwappedHandle(item, offset, tensor.shape, tensor.stride(), tensor.dtype)
        if is_new and isinstance(item.choice, Swapped) and item.choice.drop <= tick:
            self._drop([item])
        return handle

    def _kept(self, item: SavedItem, tensor: torch.Tensor) -> KeptHandle:
        is_source = self.plan is None or item.number in self.plan.sources
        if is_source and item.tensor is None:
            item.tensor = tensor.detach()
        return KeptHandle(item, tensor.detach(), tensor._version)

    def _new_item(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> SavedItem:
        number = self._num_items
        self._num_items += 1
        drop = _NEVER if self.drops_later else self._clock - 1
        choice: Choice | None = Swapped(number, drop, None)
        if self.plan is None and self.stays is not None and self.stays(storage):
            choice = None
        remaking = None
        if self.plan is not None and self._follows:
            planned = self.plan.choice_of.get(number)
            remaking = self._remaking(planned) if isinstance(planned, Recomputed) else None
            if remaking is not None or not isinstance(planned, Recomputed):
                choice = planned
        original = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        root = weakref.ref(root_of(tensor))
        item = SavedItem(number, storage.nbytes(), choice, original, root, tensor._version)
        if remaking is not None:
            item.remaking, item.checksum = remaking, checksum(storage)
            self.counts.num_recomputed += 1
        self._items[storage._cdata] = item
        self._by_number[number] = item
        return item

    def _remaking(self, choice: Recomputed) -> Remaking | None:
        """How to make a storage again; None if what it is made from is gone: then it is swapped."""
        numbers, replay = choice.recipe.sources, self._replays[choice.storage]
        sources = [self._by_number[number] for number in numbers if number in self._by_number]
        if len(sources) < len(numbers):
            return None
        return Remaking(replay, sources, replay.versions())

    def _send_out(self, item: SavedItem, tensor: torch.Tensor) -> None:
        assert isinstance(item.choice, Swapped)
        if self.verify:
            item.checksum = checksum(tensor.untyped_storage())
        copy = item.leave(self.link.tier, tensor)
        self._ask(Transfer("out", item.number), copy)
        if self.verify and not covers_storage(tensor):
            self._wait(Transfer("out", item.number))  # before others write into their parts
        self._drops.setdefault(item.choice.drop, []).append(item)
        self.counts.num_swapped += 1
        self.counts.out_bytes += item.num_bytes

    # Unpacks.

    def _unpack(self, handle: Handle) -> torch.Tensor:
        tick = self._tick()
        self.counts.num_unpacks += 1
        item = handle.item
        if item is not None:
            self._check_unpack(tick, item)
        if self.observer is not None:
            self.observer.unpacked(item, tick)
        tensor = handle.checked() if isinstance(handle, KeptHandle) else self._tensor_of(handle)
        if self.observer is not None:
            self.observer.tick_ended()
        return tensor

    def _tensor_of(self, handle: SwappedHandle) -> torch.Tensor:
        self._have(handle.item)
        handle.item.check()
        return handle.made_again()

    def _have(self, item: SavedItem) -> None:
        """Have the bytes of a storage that may be away, or on its way back."""
        if item.remaking is not None:
            self._recompute(item, item.remaking)
        elif item.is_in_tier:
            self._bring(item)
        if item.back is not None:
            self._wait(Transfer("in", item.number))
            item.back = None
            item.verify()

    def _recompute(self, item: SavedItem, remaking: Remaking) -> None:
        for source in remaking.sources:
            self._have(source)
        begin = time.perf_counter()
        self._items[item.make_again()._cdata] = item  # a double backward saves it again
        self.counts.recompute_seconds += time.perf_counter() - begin
        self.counts.recomputed_bytes += item.num_bytes

    def _bring(self, item: SavedItem) -> None:
        if self.observer is not None:
            self.observer.bringing(item, self.link)
        copy = item.come_back()
        assert copy.storage is not None
        self._items[copy.storage._cdata] = item  # a double backward saves it again
        if self.observer is not None:
            self.observer.brought(item)
        self._ask(Transfer("in", item.number), copy)
        self.counts.in_bytes += item.num_bytes

    # The clock.

    def _tick(self) -> int:
        """Count a pack or unpack, and do what is due before it. Returns its number."""
        tick = self._clock
        self._clock += 1
        if self.observer is not None:
            self.observer.ticked()
        if tick in self._drops:
            self._drop(list(self._drops[tick]))
        if self.plan is not None and self._follows:
            for number in self.plan.brings.get(tick, ()):
                item = self._by_number.get(number)
                if item is not None and item.is_in_tier:
                    self._bring(item)
        return tick

    def _drop(self, items: Iterable[SavedItem]) -> None:
        for item in items:
            assert isinstance(item.choice, Swapped)
            due = self._drops[item.choice.drop]
            due.remove(item)
            if not due:
                del self._drops[item.choice.drop]
            self._wait(Transfer("out", item.number))
            item.drop()

    def _ask(self, transfer: Transfer, copy: Copy) -> None:
        if self.observer is not None:
            self.observer.asked(transfer, copy)
        self._turns.ask(transfer, copy)

    def _wait(self, transfer: Transfer) -> None:
        item = self._by_number[transfer.storage]
        copy = item.out if transfer.direction == "out" else item.back
        if copy is None or copy.done.is_set():
            self.link.check()
            return
        begin = time.perf_counter()
        self._turns.wait(transfer, copy)
        end = time.perf_counter()
        self.counts.wait_seconds += end - begin
        self.counts.num_waits += 1
        if self.observer is not None:
            self.observer.waited(transfer, begin, end)

    # Steps that differ from their plan.

    def _check_pack(self, tick: int, number: int | None, num_bytes: int) -> None:
        if self.plan is None or not self._follows:
            return
        expected = self.plan.storage_of_tick.get(tick)
        if expected != number:
            self._change(f"tick {tick} saves {_named(number)}, the plan expects {_named(expected)}")
        elif number is not None and num_bytes != self.plan.storages[number].num_bytes:
            planned = self.plan.storages[number].num_bytes
            self._change(
                f"tick {tick} saves {num_bytes} bytes in storage {number}, the plan expects "
                f"{planned}"
            )

    def _check_unpack(self, tick: int, item: SavedItem) -> None:
        if self.plan is None or not self._follows:
            return
        use = self.plan.storages[item.number].use_tick
        if use is None or tick < use:
            self._change(f"tick {tick} asks for storage {item.number}, the plan expects {use}")

    def _change(self, change: str) -> None:
        """From here on nothing is as planned: swap all that follows at once, bring on demand."""
        if self.on_change == "raise":
            raise StepChangedError(
                f"the step differs from its swap plan: {change}. Profile and plan it again, or let "
                "it go on with on_change='swap'"
            )
        self.counts.change, self._follows = change, False
        self._turns.abandon()
        self.drop_all()


def _named(number: int | None) -> str:
    return "no storage that could leave" if number is None else f"storage {number}"
