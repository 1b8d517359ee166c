"""Slots: fixed buffers that borrowed weights are streamed into.

Two threads meet here. The housekeeper waits for a free slot (``reserve``) and signals a ready one
(``mark_ready``, ``fail``); the compute thread waits for a ready slot (``wait_ready``) and signals a
free one (``release``, ``restart``, ``pause``, ``resume``, ``close``). One condition guards all of
it, and each change of state notifies the other side.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from elbowroom.core.errors import PoolError


class SlotState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    IN_USE = "in use"


@dataclass
class Slot:
    """A buffer (uint8) for one layer at a time: ``layer``, which is None when the slot is free."""

    index: int
    buffer: torch.Tensor
    state: SlotState = SlotState.FREE
    layer: int | None = None


class Slots:
    """The slots of one rank, of ``slot_bytes`` each. All memory is taken, and touched, at once.

    ``slot_of`` has the number of the slot that each layer always comes into.
    """

    def __init__(self, slot_of: Mapping[int, int], slot_bytes: int) -> None:
        self._slots = [
            Slot(index, torch.zeros(slot_bytes, dtype=torch.uint8))
            for index in range(1 + max(slot_of.values()))
        ]
        self._slot_of = {layer: self._slots[index] for layer, index in slot_of.items()}
        self._changed = threading.Condition()
        self._epoch = 0
        self._failure: BaseException | None = None
        self._is_paused = False
        self._is_closed = False

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._slots]

    def buffer_of(self, layer: int) -> torch.Tensor:
        """The memory of the slot that ``layer`` comes into."""
        return self._slot_of[layer].buffer

    @property
    def epoch(self) -> int:
        """The number of restarts so far: the housekeeper starts its order anew when it changes."""
        return self._epoch

    def reserve(self, layer: int, epoch: int) -> Slot | None:
        """Wait until the slot of ``layer`` is free and reserve it. Called by the housekeeper.

        None when the order was restarted since ``epoch``, or the slots were closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_stale(epoch)
                    or (not self._is_paused and self._free_slot(layer) is not None)
                )
            )
            slot = None if self._is_stale(epoch) else self._free_slot(layer)
            if slot is not None:
                slot.state, slot.layer = SlotState.FILLING, layer
            return slot

    def mark_ready(self, slot: Slot, epoch: int) -> None:
        """Hand over a slot whose layer is whole. Called by the housekeeper.

        After a restart nobody wants the layer: the slot is free again.
        """
        with self._changed:
            if epoch == self._epoch:
                slot.state = SlotState.READY
            else:
                slot.state, slot.layer = SlotState.FREE, None
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits for a slot that the housekeeper died of ``error``, and called this."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait_ready(self, layer: int, timeout_seconds: float) -> Slot:
        """Wait for the slot that holds ``layer`` and take it into use. Called by compute.

        Raises PoolError when it is not ready in time, or the housekeeper has failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or self._ready_slot(layer) is not None,
                timeout_seconds,
            )
            slot = self._ready_slot(layer)
            if self._failure is not None or slot is None:
                raise PoolError(
                    f"layer {layer} was not streamed within {timeout_seconds:g} s "
                    f"(slots: {_describe(self._slots)}; cause: {self._failure!r})"
                ) from self._failure
            slot.state = SlotState.IN_USE
            return slot

    def release(self, slot: Slot) -> None:
        """Free a slot whose layer has been used. Called by compute.

        Raises PoolError unless the slot is in use.
        """
        with self._changed:
            if slot.state is not SlotState.IN_USE:
                raise PoolError(f"slot {slot.index} released while {slot.state.value}")
            slot.state, slot.layer = SlotState.FREE, None
            self._changed.notify_all()

    def restart(self) -> None:
        """Start the order anew and drop what was fetched ahead. Called by compute."""
        with self._changed:
            self._restart()

    def pause(self) -> None:
        """Reserve nothing until ``resume`` and drop what was fetched ahead. Called by compute."""
        with self._changed:
            self._is_paused = True
            self._restart()

    def resume(self) -> None:
        """Reserve slots again, from the first layer on. Called by compute after ``pause``."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """Reserve nothing any more, so that the housekeeper can end. Called by compute."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise PoolError if states and layers disagree; see ``check_slots``."""
        with self._changed:
            check_slots(self._slots)

    def _restart(self) -> None:
        self._epoch += 1
        for slot in self._slots:
            if slot.state is SlotState.READY:
                slot.state, slot.layer = SlotState.FREE, None
        self._changed.notify_all()

    def _is_stale(self, epoch: int) -> bool:
        return self._is_closed or epoch != self._epoch

    def _free_slot(self, layer: int) -> Slot | None:
        slot = self._slot_of[layer]
        return slot if slot.state is SlotState.FREE else None

    def _ready_slot(self, layer: int) -> Slot | None:
        slot = self._slot_of[layer]
        return slot if slot.layer == layer and slot.state is SlotState.READY else None


def check_slots(slots: Sequence[Slot]) -> None:
    """Raise PoolError unless every slot's state and layer agree and no layer is held twice."""
    layers = [slot.layer for slot in slots if slot.layer is not None]
    torn = [slot for slot in slots if (slot.layer is None) != (slot.state is SlotState.FREE)]
    if torn or len(layers) != len(set(layers)):
        raise PoolError(f"slots are inconsistent: {_describe(slots)}")


def _describe(slots: Sequence[Slot]) -> str:
    return ", ".join(f"{slot.index}: {slot.state.value} layer {slot.layer}" for slot in slots)
