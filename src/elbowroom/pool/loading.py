"""A loader, which takes a model's blocks over one by one and makes a pool of them when loaded."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from elbowroom.core.errors import PoolError, UnsupportedModelError
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.assembly import Layers, choose_leases, make_server
from elbowroom.pool.ffn import Ffn, find_ffn, frozen
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.pool import Pool
from elbowroom.pool.store import Store


class PoolLoader:
    """A replica's part in a pool, while its model is built and its weights are loaded.

    First ``add_block`` for every block in order; then load weights; then ``attach`` gives the pool.
    """

    def __init__(self, share: PoolShare, store: Store, options: PoolOptions | None = None) -> None:
        self._share = share
        self._store = store
        self._options = options or PoolOptions()
        self._ffns: list[Ffn] = []
        self._allocated: dict[int, torch.Tensor] = {}
        self._reopened: dict[int, torch.Tensor] = {}

    def owns(self, layer: int) -> bool:
        """Tell whether this replica keeps ``layer`` for its group."""
        return self._share.owners[layer] == self._share.rank

    def add_block(self, block: nn.Module, keep_weights: bool = True) -> Ffn:
        """Take over the next block's feed-forward weights.

        An owned layer's weights move into the store. Those of a borrowed layer, and of one that an
        earlier process of this rank has published, become placeholders on the meta device, which
        hold no memory. ``keep_weights`` False skips copying the present values, for weights that
        are loaded later.

        Raises UnsupportedModelError for a block that the pool cannot hold.
        """
        layer = len(self._ffns)
        if layer >= len(self._share.owners):
            raise UnsupportedModelError(
                f"the plan knows {len(self._share.owners)} layers, {type(block).__name__} is one "
                f"more: models with a second stack of blocks cannot be pooled, use --pool none"
            )
        ffn = find_ffn(block)
        self._ffns.append(ffn)
        if not self.owns(layer):
            _replace_with_placeholders(ffn)
            return ffn
        published = self._store.reopen(layer, self._share.rank, ffn.num_bytes)
        if published is None:
            self._allocated[layer] = self._store.allocate(layer, ffn.num_bytes)
            _move_weights(ffn, self._allocated[layer], keep_weights)
        else:
            self._reopened[layer] = published
            _replace_with_placeholders(ffn)
        return ffn

    def attach(self) -> Pool:
        """Publish what this rank owns, open what its peers own, and make the pool of both.

        Waits for the peers. From here on ``Pool.run`` is each feed-forward module's ``forward``.
        Raises PeerLostError when a peer dies or does not publish in time, and PoolError when the
        plan's fetches are not those of the layers that this rank borrows, or blocks are missing.
        """
        if len(self._ffns) != len(self._share.owners):
            raise PoolError(
                f"the plan knows {len(self._share.owners)} layers, and {len(self._ffns)} were "
                f"handed over: use --pool none"
            )
        self._publish()
        owned = self._allocated | self._reopened
        opened = self._open_borrowed()
        layers = Layers(self._share, self._store, self._options, self._ffns, owned, opened)
        pool = Pool(self._share, self._store, choose_leases(layers), make_server(layers))
        for layer, ffn in enumerate(self._ffns):
            ffn.module.forward = partial(pool.run, layer)
        return pool

    def _publish(self) -> None:
        pack = self._options.pack
        for layer, buffer in self._allocated.items():
            if pack is not None:
                spans = (span for span in self._ffns[layer].spans if not span.holds_experts)
                for matrix in (span.view(buffer) for span in spans):
                    matrix.copy_(pack(matrix))
            self._store.publish(layer)

    def _open_borrowed(self) -> dict[int, torch.Tensor]:
        timeout = self._options.peer_timeout_seconds
        return {
            layer: self._store.open(layer, self._share.owners[layer], ffn.num_bytes, timeout)
            for layer, ffn in enumerate(self._ffns)
            if not self.owns(layer)
        }


def _move_weights(ffn: Ffn, buffer: torch.Tensor, keep_values: bool) -> None:
    """Move the weights of ``ffn`` into ``buffer`` (uint8), with or without their values."""
    for span in ffn.spans:
        weight = span.view(buffer)
        if keep_values:
            weight.copy_(span.weight)
        span.weight.data = weight


def _replace_with_placeholders(ffn: Ffn) -> None:
    """Drop the weights of ``ffn``: parameters on the meta device keep their shapes and attributes.

    What is copied into them goes nowhere.
    """
    for span in ffn.spans:
        placeholder = frozen(torch.empty(span.shape, dtype=span.dtype, device="meta"))
        if span.holds_experts:
            vars(placeholder).update(vars(span.weight))
        setattr(span.module, span.leaf, placeholder)
