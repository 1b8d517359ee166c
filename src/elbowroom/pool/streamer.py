"""Streamers, which bring layers into slots: their protocol, and one for devices with streams.

On a CPU, ``Housekeeper`` copies on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch

from elbowroom.core.errors import PoolError
from elbowroom.plans.pool_actions import Fetch
from elbowroom.pool.slots import Slot, SlotState, check_slots


class Streamer(Protocol):
    """A background copier of layers into slots, in the plan's order, pass after pass."""

    streamed_bytes: int
    """Bytes copied since the start."""

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """The memory of the slots, uint8. All of it is taken when the streamer is made."""
        ...

    def buffer_of(self, layer: int) -> torch.Tensor:
        """The memory that ``layer`` comes into, in every pass."""
        ...

    def start(self) -> None:
        """Begin to fetch, once all sources are published."""
        ...

    def acquire(self, layer: int) -> Slot:
        """Give the slot that holds the next layer, for what is computed from here on.

        Raises PoolError when the layer does not come.
        """
        ...

    def release(self, slot: Slot) -> None:
        """Take a slot back: what was computed so far is all that needed its layer."""
        ...

    def restart(self) -> None:
        """Start again with the first layer, in the middle of a pass."""
        ...

    def pause(self) -> None:
        """Hold until ``resume``, between two passes: no layer is wanted."""
        ...

    def resume(self) -> None:
        """Fetch again after ``pause``, from the first layer on."""
        ...

    def sync(self) -> None:
        """Have compute wait for all copies under way, before a graph is captured or replayed."""
        ...

    def join(self) -> None:
        """Have compute wait, at the end of a capture, for the copies that the capture began."""
        ...

    def check_integrity(self) -> None:
        """Raise PoolError if slots and layers disagree."""
        ...

    def close(self) -> None:
        """Stop, and wait for copies under way."""
        ...


_Recorded = Literal["stream", "capture", "graph"]
"""Where the event of a slot's last copy was recorded: as work of its stream, in the capture under
way, or in a graph that is complete, outside of which nobody can wait for it."""


class DeviceStreamer:
    """A ``Streamer`` on a device's own streams: one for each slot's copies, beside compute.

    The host waits for nothing; streams wait for each other through two events per slot:

    - ready: recorded by the slot's copy stream after the copy; ``acquire`` has compute wait for it.
    - free: recorded by the compute stream in ``release``; the slot's next copy waits for it.

    In every pass the layers take the same slots in turn, so that a layer's weights always lie at
    the same address, and between passes the slots hold the first layers. So a whole pass may be
    captured in a graph (CUDA), and replays and passes without a graph may follow each other in any
    order. What was recorded in a capture is known in that graph alone: ``sync`` before a capture
    and before each replay stands for the waits for copies that began earlier, and ``join``, at the
    end of a capture, brings the copies for the next pass into the graph.

    A link's time is shared by all copies under way.
    """

    def __init__(
        self,
        fetches: Sequence[Fetch],
        sources: Mapping[int, torch.Tensor],
        num_slots: int,
        device: torch.device,
    ) -> None:
        slot_bytes = max(source.numel() for source in sources.values())
        self._device = torch.get_device_module(device)
        self._sources = sources
        self._layers = [fetch.layer for fetch in fetches if fetch.chunk == 0]
        self._slots = [
            Slot(index, torch.empty(slot_bytes, dtype=torch.uint8, device=device))
            for index in range(min(num_slots, len(self._layers)))
        ]
        self._copies = [self._device.Stream() for _ in self._slots]
        self._ready = [self._device.Event() for _ in self._slots]
        self._free = [self._device.Event() for _ in self._slots]
        self._recorded_in: list[_Recorded] = ["stream"] * len(self._slots)
        self._pass_bytes = sum(sources[layer].numel() for layer in self._layers)
        self.streamed_bytes = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._slots]

    def buffer_of(self, layer: int) -> torch.Tensor:
        return self._slot_of(layer).buffer

    def start(self) -> None:
        self.restart()

    def acquire(self, layer: int) -> Slot:
        slot = self._slot_of(layer)
        if slot.layer != layer:
            raise PoolError(f"slot {slot.index} holds layer {slot.layer}, asked for was {layer}")
        here: _Recorded = "capture" if self._is_capturing() else "stream"
        if self._recorded_in[slot.index] == here:
            self._ready[slot.index].wait()
        elif here == "stream":  # the event is that of a graph: wait for all there is
            self._device.current_stream().wait_stream(self._copies[slot.index])
        slot.state = SlotState.IN_USE
        return slot

    def release(self, slot: Slot) -> None:
        assert slot.layer is not None
        following = self._layers.index(slot.layer) + len(self._slots)
        self._fetch(slot, following if following < len(self._layers) else slot.index)

    def restart(self) -> None:
        for slot in self._slots:
            if slot.layer != self._layers[slot.index]:
                self._fetch(slot, slot.index)

    def pause(self) -> None:
        """Fetch the first layers, if the last pass was cut short: they stay where they are."""
        self.restart()

    def resume(self) -> None:
        """Do nothing: see ``pause``."""

    def sync(self) -> None:
        """Have compute wait for all copies under way, before a graph is captured or replayed."""
        for stream in self._copies:
            self._device.current_stream().wait_stream(stream)
        self.streamed_bytes += self._pass_bytes

    def join(self) -> None:
        """Have compute wait, at the end of a capture, for the copies that the capture began.

        A capture copies nothing: what it and ``sync`` counted is taken back.
        """
        for slot in self._slots:
            if self._recorded_in[slot.index] == "capture":
                self._ready[slot.index].wait()
                self._recorded_in[slot.index] = "graph"
        self.streamed_bytes -= 2 * self._pass_bytes

    def check_integrity(self) -> None:
        check_slots(self._slots)

    def close(self) -> None:
        """Wait for copies under way: they read memory that peers may give back after this."""
        self._device.synchronize()

    def _slot_of(self, layer: int) -> Slot:
        return self._slots[self._layers.index(layer) % len(self._slots)]

    def _is_capturing(self) -> bool:
        """Whether the current stream's work goes into a graph. Devices without graphs never say."""
        return getattr(self._device, "is_current_stream_capturing", bool)()

    def _fetch(self, slot: Slot, position: int) -> None:
        """Begin to copy the layer at ``position`` of the order, after what was computed so far."""
        slot.layer = self._layers[position]
        slot.state = SlotState.FILLING
        source = self._sources[slot.layer]
        self._recorded_in[slot.index] = "capture" if self._is_capturing() else "stream"
        self._free[slot.index].record()
        copies = self._copies[slot.index]
        with self._device.stream(copies):
            self._free[slot.index].wait()
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            self._ready[slot.index].record()
        self.streamed_bytes += source.numel()
