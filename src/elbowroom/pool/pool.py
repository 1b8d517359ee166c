"""The pool of one rank: takes over the feed-forward weights of a model's blocks and leases them.

Life: ``add_block`` for every block in order, load weights, ``attach`` (publishes what this rank
owns, opens what its peers own), ``start``, forward passes, ``close``. The forward passes need no
change: hooks on each feed-forward module take the lease before it runs and give it back after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from elbowroom.core.errors import PoolError, UnsupportedModelError
from elbowroom.core.plan import PoolShare
from elbowroom.pool.ffn import Ffn, find_ffn
from elbowroom.pool.housekeeper import Housekeeper
from elbowroom.pool.slots import Slot, Slots
from elbowroom.pool.store import Store

PEER_TIMEOUT_SECONDS = 600.0
"""How long a rank waits for a peer to publish a layer: reading a large model takes minutes."""

STREAM_TIMEOUT_SECONDS = 60.0
"""How long compute waits for one streamed layer before it gives up."""

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Brings a matrix into the form its kernel wants; same shape, dtype and bytes."""


@dataclass(frozen=True)
class PoolStats:
    """Counters since the start. Bytes mapped are counted once, bytes streamed at every copy."""

    owned_bytes: int
    mapped_bytes: int
    slot_bytes: int
    streamed_bytes: int
    wait_seconds: float


class Pool:
    """One rank's view of the pool. Not thread-safe: one thread computes."""

    def __init__(
        self,
        share: PoolShare,
        store: Store,
        pack: Pack | None = None,
        peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
        stream_timeout_seconds: float = STREAM_TIMEOUT_SECONDS,
    ) -> None:
        self.share = share
        self._store = store
        self._pack = pack
        self._peer_timeout_seconds = peer_timeout_seconds
        self._stream_timeout_seconds = stream_timeout_seconds
        self._ffns: list[Ffn] = []
        self._owned: dict[int, torch.Tensor] = {}
        self._reopened: dict[int, torch.Tensor] = {}
        self._slots: Slots | None = None
        self._housekeeper: Housekeeper | None = None
        self._slot_weights: dict[tuple[int, int], list[nn.Parameter]] = {}
        self._streamed_layers = sorted({fetch.layer for fetch in share.fetches})
        self._next_streamed = 0
        self._lease: int | None = None
        self._slot: Slot | None = None
        self._mapped_bytes = 0
        self._wait_seconds = 0.0

    def owns(self, layer: int) -> bool:
        return self.share.owners[layer] == self.share.rank

    def add_block(self, block: nn.Module, keep_weights: bool = True) -> Ffn:
        """Take over the next block's feed-forward weights.

        An owned layer's matrices move into the store. Those of a borrowed layer, and of one that an
        earlier process of this rank has published, become placeholders on the meta device, which
        hold no memory. ``keep_weights`` False skips copying the present values, for weights that
        are loaded later.

        Raises UnsupportedModelError for a block that the pool cannot hold.
        """
        layer = len(self._ffns)
        if layer >= len(self.share.owners):
            raise UnsupportedModelError(
                f"the plan knows {len(self.share.owners)} layers, {type(block).__name__} is one "
                f"more: models with a second stack of blocks cannot be pooled, use --pool none"
            )
        ffn = find_ffn(block)
        self._ffns.append(ffn)
        is_new = self.owns(layer)
        if self.owns(layer):
            before = self._store.reopen(layer, self.share.rank, ffn.num_bytes)
            if before is not None:
                self._reopened[layer] = before
                is_new = False
        if is_new:
            self._owned[layer] = self._store.allocate(layer, ffn.num_bytes)
            for span in ffn.spans:
                weight = span.view(self._owned[layer])
                if keep_weights:
                    weight.copy_(span.linear.get_parameter("weight"))
                span.linear.weight.data = weight
        else:
            for span in ffn.spans:
                span.linear.weight = _frozen(
                    torch.empty(span.shape, dtype=span.dtype, device="meta")
                )
        ffn.module.register_forward_pre_hook(partial(self._before, layer))
        ffn.module.register_forward_hook(partial(self._after, layer), always_call=True)
        return ffn

    def attach(self) -> None:
        """Publish what this rank owns, then open what its peers own; waits for them.

        Raises PeerLostError when a peer dies or does not publish in time.
        """
        for layer, buffer in self._owned.items():
            for span in self._ffns[layer].spans:
                if self._pack is not None:
                    view = span.view(buffer)
                    view.copy_(self._pack(view))
            self._use(layer, buffer)
            self._store.publish(layer)
        for layer, buffer in self._reopened.items():
            self._use(layer, buffer)
        self._owned |= self._reopened
        opened = {
            layer: self._store.open(
                layer, self.share.owners[layer], ffn.num_bytes, self._peer_timeout_seconds
            )
            for layer, ffn in enumerate(self._ffns)
            if not self.owns(layer)
        }
        if self.share.mode == "streamed":
            self._prepare_streaming(opened)
        else:
            self._map(opened)

    def start(self) -> None:
        """Begin to stream, if this rank streams: from here on slots fill ahead of compute."""
        if self._housekeeper is not None:
            self._housekeeper.start()

    def acquire(self, layer: int) -> None:
        """Take the lease on a layer: its matrices are usable until ``release``.

        Raises PoolError when another lease is open, when streamed layers are asked for out of
        order, or when the layer does not arrive in time.
        """
        if self._lease is not None:
            raise PoolError(f"layer {layer} asked for while layer {self._lease} is leased")
        if self._slots is not None and not self.owns(layer):
            self._slot = self._wait_for_slot(layer, self._slots)
            weights = self._slot_weights[self._slot.index, layer]
            for span, weight in zip(self._ffns[layer].spans, weights, strict=True):
                span.linear.weight = weight
        self._lease = layer

    def release(self, layer: int) -> None:
        """End the lease on a layer. Its slot, if it has one, is free for the next."""
        if self._lease != layer:
            raise PoolError(f"layer {layer} released, but {self._lease} is leased")
        self._lease = None
        if self._slot is not None and self._slots is not None:
            self._slots.release(self._slot)
            self._slot = None

    def stats(self) -> PoolStats:
        return PoolStats(
            owned_bytes=sum(buffer.numel() for buffer in self._owned.values()),
            mapped_bytes=self._mapped_bytes,
            slot_bytes=sum(b.numel() for b in self._slots.buffers) if self._slots else 0,
            streamed_bytes=self._housekeeper.streamed_bytes if self._housekeeper else 0,
            wait_seconds=self._wait_seconds,
        )

    def check_integrity(self) -> None:
        """Raise PoolError if the lease and the slots disagree."""
        if self._slot is not None and self._slot.layer != self._lease:
            raise PoolError(f"lease on {self._lease}, slot {self._slot.index} on another layer")
        if self._slots is not None:
            self._slots.check_integrity()

    def close(self) -> None:
        """Stop streaming and leave the group. Peers that mapped our layers keep them."""
        if self._housekeeper is not None:
            self._housekeeper.close()
            self._housekeeper = None
        self._store.close()

    def _map(self, opened: dict[int, torch.Tensor]) -> None:
        for layer, buffer in opened.items():
            self._use(layer, buffer)
            self._mapped_bytes += buffer.numel()

    def _use(self, layer: int, buffer: torch.Tensor) -> None:
        for span in self._ffns[layer].spans:
            span.linear.weight = _frozen(span.view(buffer))

    def _prepare_streaming(self, opened: dict[int, torch.Tensor]) -> None:
        if set(opened) != set(self._streamed_layers):
            raise PoolError(
                f"rank {self.share.rank} borrows layers {sorted(opened)}, but its plan fetches "
                f"{self._streamed_layers}: plan again"
            )
        if not opened:
            return
        slot_bytes = max(buffer.numel() for buffer in opened.values())
        self._slots = Slots(self.share.num_slots, slot_bytes)
        for layer in opened:
            for index, buffer in enumerate(self._slots.buffers):
                self._slot_weights[index, layer] = [
                    _frozen(span.view(buffer)) for span in self._ffns[layer].spans
                ]
        self._housekeeper = Housekeeper(self.share.fetches, opened, self._slots)

    def _wait_for_slot(self, layer: int, slots: Slots) -> Slot:
        if layer != self._streamed_layers[self._next_streamed]:
            if layer != self._streamed_layers[0]:
                raise PoolError(
                    f"layer {layer} asked for, layer {self._streamed_layers[self._next_streamed]} "
                    f"is next: a streamed pool runs its layers in order"
                )
            slots.restart()  # the last pass was cut short, by an exception for instance
            self._next_streamed = 0
        start = time.perf_counter()
        slot = slots.wait_ready(layer, self._stream_timeout_seconds)
        self._wait_seconds += time.perf_counter() - start
        self._next_streamed = (self._next_streamed + 1) % len(self._streamed_layers)
        return slot

    def _before(self, layer: int, *_: object) -> None:
        self.acquire(layer)

    def _after(self, layer: int, *_: object) -> None:
        if self._lease == layer:  # not so when ``acquire`` itself raised
            self.release(layer)


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
