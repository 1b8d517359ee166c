"""A loader, which takes a model's blocks over one by one and makes a pool of them when loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from elbowroom.core.errors import PeerLostError, PoolError, UnsupportedModelError
from elbowroom.plans.pool import NO_OWNER, PoolShare
from elbowroom.pool.assembly import Layers, choose_leases, make_server
from elbowroom.pool.layer import PooledLayer, pooled_layer
from elbowroom.pool.options import PoolOptions
from elbowroom.pool.pool import Pool
from elbowroom.pool.store import Store
from elbowroom.pool.stray import stray_tensors


class PoolLoader:
    """A replica's part in a pool, while its model is built and its weights are loaded.

    First ``add_block`` for every block in order; then load weights, those of ``layers_to_read`` one
    layer after the other, each followed by ``take``; then ``attach`` gives the pool.

    A replica really loads and processes what it borrows, and lets it go: so it knows that the owner
    has the same bytes as it would have itself. Meanwhile all such layers lie in the memory of one.
    """

    def __init__(self, share: PoolShare, store: Store, options: PoolOptions | None = None) -> None:
        self._share = share
        self._store = store
        self._options = options or PoolOptions()
        self._layers: list[PooledLayer | None] = []
        self._built_bytes: dict[int, int] = {}
        self._seals: dict[int, tuple[int, ...]] = {}
        self._meanwhile = torch.empty(0, dtype=torch.uint8, device=store.device)
        self._held: set[int] = set()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def owns(self, layer: int) -> bool:
        """Tell whether this replica keeps ``layer`` for its group."""
        return self._share.owners[layer] == self._share.rank

    def layers_to_read(self) -> list[int]:
        """Layers that are loaded one at a time; none any more once the pool is attached.

        They are those of peers, and those that an earlier process of this rank has published.
        """
        return sorted(self._held)

    def modules_of(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules of ``layer`` that the pool holds."""
        pooled = self._layers[layer]
        return pooled.modules if pooled else ()

    def add_block(self, block: nn.Module, is_loaded: bool = True) -> PooledLayer | None:
        """Take over the next block's feed-forward weights. None for a block that has none.

        Memory of layers that are not this replica's to keep is given up. ``is_loaded`` False says
        that weights are still to come, see ``take``.

        Raises UnsupportedModelError for a block that the pool cannot hold.
        """
        layer = len(self._layers)
        if layer >= len(self._share.owners):
            raise UnsupportedModelError(
                f"the plan knows {len(self._share.owners)} layers, {type(block).__name__} is one "
                f"more: models with a second stack of blocks cannot be pooled, use --pool none"
            )
        pooled = pooled_layer(block)
        if (pooled is None) != (self._share.owners[layer] == NO_OWNER):
            raise UnsupportedModelError(
                f"the plan knows {'no' if pooled else 'a'} feed-forward network in layer {layer}, "
                f"{type(block).__name__} has {'one' if pooled else 'none'}: use --pool none"
            )
        self._layers.append(pooled)
        if pooled is None:
            return None
        self._check_shared(layer, pooled)
        self._built_bytes[layer] = sum(tensor.nbytes for _, tensor in pooled.tensors())
        if not self.owns(layer) or self._store.was_published(layer):
            self._held.add(layer)
            self.take(layer) if is_loaded else self._let_go(pooled)
        return pooled

    def take(self, layer: int) -> None:
        """Take note of a layer of ``layers_to_read``, loaded and processed, and give it up."""
        self._settle(layer)
        pooled = self._layers[layer]
        assert pooled is not None
        self._let_go(pooled)

    def attach(self) -> Pool:
        """Publish what this rank owns, open what its peers own, and make the pool of both.

        Waits for the peers. From here on ``Pool.run`` is each feed-forward module's ``forward``,
        unless all weights stay where they are. Raises PeerLostError when a peer dies or does not
        publish in time, and PoolError when a peer has other bytes than this rank has read, when the
        plan's fetches are not those of the layers that this rank borrows, or blocks are missing.
        """
        if len(self._layers) != len(self._share.owners):
            raise PoolError(
                f"the plan knows {len(self._share.owners)} layers, and {len(self._layers)} were "
                f"handed over: use --pool none"
            )
        if not self._built_bytes:
            raise PoolError("no layer of this model has weights for a pool: use --pool none")
        owned = dict(self._publish())
        opened = {layer: self._open(layer) for layer in sorted(self._held)}
        self._meanwhile = self._meanwhile.new_empty(0)
        here = {layer: buffer for layer, buffer in opened.items() if self.owns(layer)}
        for layer in here:
            del opened[layer]
        pooled = {layer: one for layer, one in enumerate(self._layers) if one is not None}
        layers = Layers(self._share, self._store, self._options, pooled, owned | here, opened)
        choice = choose_leases(layers)
        self._check_bound(layers)
        self._held.clear()
        pool = Pool(self._share, self._store, choice, make_server(layers), min(pooled))
        if self._share.streams:
            for layer, one in pooled.items():
                _run_by(pool, layer, one)
        return pool

    def _check_shared(self, layer: int, pooled: PooledLayer) -> None:
        """Raise UnsupportedModelError for weights that an earlier layer has, too."""
        mine = {id(tensor) for _, tensor in pooled.tensors()}
        for earlier in self._layers[:layer]:
            if earlier and mine & {id(tensor) for _, tensor in earlier.tensors()}:
                raise UnsupportedModelError(
                    f"layer {layer} has weights of an earlier layer: no pool holds those; use "
                    f"--pool none"
                )

    def _let_go(self, pooled: PooledLayer) -> None:
        """Have a layer's tensors lie where those of all layers that are given up do.

        Whatever is written there does no harm: it is written anew before it is read.
        """
        num_bytes = pooled.data_bytes
        if num_bytes > self._meanwhile.numel():
            self._meanwhile = self._meanwhile.new_empty(num_bytes)
            for layer in self._held:
                if (other := self._layers[layer]) is not None:
                    other.give_up(self._meanwhile)
        pooled.give_up(self._meanwhile)

    def _settle(self, layer: int) -> None:
        """Fix what a layer holds. Raises UnsupportedModelError for weights out of the pool's reach.

        A kernel may have taken the weights into a form of its own, of which only a handle is left,
        or keep tensors that lie in a parameter's memory: those would not move with it.
        """
        pooled = self._layers[layer]
        assert pooled is not None
        self._seals[layer] = pooled.settle()
        tensors = pooled.tensors()
        after, before = sum(tensor.nbytes for _, tensor in tensors), self._built_bytes[layer]
        if after * 2 < before:
            raise UnsupportedModelError(
                f"layer {layer} had {before} bytes of weights, of which {after} are left after "
                f"processing: the rest is hidden in a kernel; use --pool none"
            )
        for module in pooled.modules:
            for name, stray in stray_tensors(module):
                if any(_share_memory(stray, tensor) for _, tensor in tensors):
                    raise UnsupportedModelError(
                        f"layer {layer}: {name} lies in the memory of a parameter and is none: no "
                        f"pool can move it; use --pool none"
                    )

    def _publish(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Move each layer that this rank loaded for its group into the store, and publish it."""
        for layer, pooled in enumerate(self._layers):
            if pooled is None or not self.owns(layer) or layer in self._held:
                continue
            self._settle(layer)
            buffer = self._store.allocate(layer, pooled.num_bytes)
            pooled.move_to(buffer)
            pooled.manifest.write_seal(buffer, self._seals[layer])
            self._store.publish(layer)
            yield layer, buffer

    def _open(self, layer: int) -> torch.Tensor:
        """Open a layer that somebody has published, and compare it with what was read here.

        Raises PeerLostError as ``Store.open`` does, and where it is not the same.
        """
        owner, pooled = self._share.owners[layer], self._layers[layer]
        assert pooled is not None
        timeout = self._options.peer_timeout_seconds
        buffer = self._store.open(layer, owner, pooled.num_bytes, timeout)
        theirs = pooled.manifest.read_seal(buffer)
        difference = pooled.manifest.difference(self._seals[layer], theirs)
        if difference is not None:
            raise PeerLostError(
                f"layer {layer} of rank {owner} differs from what rank {self._share.rank} has read "
                f"in {difference}: all replicas must load the same files with the same vLLM and "
                f"the same options"
            )
        return buffer

    def _check_bound(self, layers: Layers) -> None:
        """Compare what each layer computes with, now that it is bound, with what was published.

        Of layers that are streamed, each is copied into its slot for this.
        """
        for layer, pooled in layers.pooled.items():
            opened = layers.opened.get(layer)
            if opened is not None and self._share.streams:
                pooled.fill_from(opened)
            pooled.check_seal(self._seals[layer], f"layer {layer}")


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or not one.numel() or one.device != other.device:
        return False
    storage = one.untyped_storage()
    return storage.data_ptr() == other.untyped_storage().data_ptr() and storage.nbytes() > 0


def _run_by(pool: Pool, layer: int, pooled: PooledLayer) -> None:
    """Have the modules of a layer run under one lease: from the first to the last of them."""
    first, *others = pooled.modules
    if not others:
        first.forward = partial(pool.run, layer)
        return
    first.forward = partial(pool.run_first, layer)
    others[-1].forward = partial(pool.run_last, layer, pooled.forwards[-1])
