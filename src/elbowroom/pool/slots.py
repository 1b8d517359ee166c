"""Slots: fixed buffers that borrowed weights are streamed into.

Two threads meet here. The housekeeper reserves slots and marks them ready; the compute thread
waits for a ready slot and releases it. One condition guards all of it, and each change of state
notifies the other side.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
    """One buffer, and which layer it is for. ``layer`` is None exactly when the slot is free."""

    index: int
    buffer: torch.Tensor
    state: SlotState = SlotState.FREE
    layer: int | None = None


class Slots:
    """The slots of one rank. All memory is taken, and touched, when they are made."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self._slots = [
            Slot(index, torch.zeros(slot_bytes, dtype=torch.uint8)) for index in range(num_slots)
        ]
        self._changed = threading.Condition()
        self._epoch = 0
        self._failure: BaseException | None = None
        self._is_paused = False
        self._is_closed = False

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._slots]

    @property
    def epoch(self) -> int:
        """Counts restarts: the housekeeper starts its order anew when it changes."""
        return self._epoch

    def reserve(self, layer: int, epoch: int) -> Slot | None:
        """Housekeeper: a free slot for ``layer``, waiting for one.

        None when the order was restarted or the slots were closed meanwhile.
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
        """Housekeeper: the layer is whole. After a restart, nobody wants it: the slot is free."""
        with self._changed:
            if epoch == self._epoch:
                slot.state = SlotState.READY
            else:
                slot.state, slot.layer = SlotState.FREE, None
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Housekeeper: it died of ``error``; whoever waits is told."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait_ready(self, layer: int, timeout_seconds: float) -> Slot:
        """Compute: the slot that holds ``layer``, now in use. PoolError after the time-out."""
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
        """Compute: the layer's work is done."""
        with self._changed:
            if slot.state is not SlotState.IN_USE:
                raise PoolError(f"slot {slot.index} released while {slot.state.value}")
            slot.state, slot.layer = SlotState.FREE, None
            self._changed.notify_all()

    def restart(self) -> None:
        """Compute: the next layer wanted is the first again. What was fetched ahead is dropped."""
        with self._changed:
            self._restart()

    def pause(self) -> None:
        """Compute: no streamed layer is wanted until ``resume``. What was fetched is dropped."""
        with self._changed:
            self._is_paused = True
            self._restart()

    def resume(self) -> None:
        """Compute: from the first layer on."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """See ``check_slots``."""
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
        """A free slot, unless ``layer`` still has one from the pass before."""
        if any(slot.layer == layer for slot in self._slots):
            return None
        return next((slot for slot in self._slots if slot.state is SlotState.FREE), None)

    def _ready_slot(self, layer: int) -> Slot | None:
        return next(
            (s for s in self._slots if s.layer == layer and s.state is SlotState.READY), None
        )


def check_slots(slots: Sequence[Slot]) -> None:
    """Raise PoolError unless every slot's state and layer agree and no layer is held twice."""
    layers = [slot.layer for slot in slots if slot.layer is not None]
    torn = [slot for slot in slots if (slot.layer is None) != (slot.state is SlotState.FREE)]
    if torn or len(layers) != len(set(layers)):
        raise PoolError(f"slots are inconsistent: {_describe(slots)}")


def _describe(slots: Sequence[Slot]) -> str:
    return ", ".join(f"{slot.index}: {slot.state.value} layer {slot.layer}" for slot in slots)
