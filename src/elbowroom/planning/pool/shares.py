"""Decisions about the pool: who owns which layer, and in which order replicas fetch the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elbowroom.core.errors import MemoryPlanError
from elbowroom.plans.pool import NO_OWNER, FetchOrder, PoolMode, PoolShare
from elbowroom.plans.pool_actions import Fetch

SHIP_ROWS = 256
"""Rows of the largest batch that is shipped; buffers are sized for it."""

SLICE_BYTES = 2 * 1024**2
"""Size of one slice of a sliced fetch (NVIDIA DWDP pulls 2 MiB slices)."""


def assign_owners(ffn_bytes: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Owner of every layer, balanced by bytes.

    Layers are dealt in cycles of ``num_ranks``; within a cycle each replica takes at most one
    layer, the largest layer going to the replica that holds least. Equal layers give l mod d (SiDP,
    section 3, figure of the pool). Layers without feed-forward weights have no owner.

    Args:
        ffn_bytes: feed-forward bytes of each layer.
        num_ranks: d, the number of replicas in the group, at least 1.

    """
    held = [0] * num_ranks
    owners = [NO_OWNER] * len(ffn_bytes)
    for cycle in _cycles([layer for layer, size in enumerate(ffn_bytes) if size], num_ranks):
        free = set(range(num_ranks))
        for turn, layer in sorted(enumerate(cycle), key=lambda one: (-ffn_bytes[one[1]], one[1])):
            rank = min(free, key=lambda rank: (held[rank], rank != turn, rank))
            free.remove(rank)
            held[rank] += ffn_bytes[layer]
            owners[layer] = rank
    return tuple(owners)


def fetch_order(
    owners: Sequence[int],
    ffn_bytes: Sequence[int],
    rank: int,
    num_ranks: int,
    num_slots: int,
    order: FetchOrder,
    slice_bytes: int = SLICE_BYTES,
) -> tuple[Fetch, ...]:
    """Fetches of one forward pass for replica ``rank``, in the order they are issued.

    Borrowed layers are taken cycle by cycle, in windows of at most ``num_slots`` layers. Within a
    window, replica r starts r layers in and wraps ("peak shifting", SiDP section 4): readers then
    do not meet at one owner. With d-1 slots a window is a whole cycle, as in the paper; with fewer
    it is shorter, because a window larger than the slots would wait for itself.

    ``sliced`` takes the layers of a window in turns of ``slice_bytes``, so that two slots are
    enough to spread one reader over two owners. ``in-order`` does not shift, so that all readers
    meet at the owner of the next layer; it is a baseline for comparison.
    """
    fetches: list[Fetch] = []
    owned = [layer for layer, owner in enumerate(owners) if owner != NO_OWNER]
    for cycle in _cycles(owned, num_ranks):
        borrowed = [layer for layer in cycle if owners[layer] != rank]
        own = next((layer for layer in cycle if owners[layer] == rank), cycle[0] + rank)
        for at in range(0, len(borrowed), num_slots):
            window = borrowed[at : at + num_slots]
            turn = sum(layer < own for layer in window) % len(window)
            turn = 0 if order == "in-order" else turn
            fetches += _fetch_window(window[turn:] + window[:turn], ffn_bytes, order, slice_bytes)
    return tuple(fetches)


def _cycles(layers: Sequence[int], num_ranks: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(layers), num_ranks):
        yield layers[start : start + num_ranks]


def _fetch_window(
    window: Sequence[int], ffn_bytes: Sequence[int], order: FetchOrder, slice_bytes: int
) -> list[Fetch]:
    if order != "sliced":
        return [Fetch(layer, 0, 1) for layer in window]
    chunks = {layer: max(1, -(-ffn_bytes[layer] // slice_bytes)) for layer in window}
    return [
        Fetch(layer, chunk, chunks[layer])
        for chunk in range(max(chunks.values()))
        for layer in window
        if chunk < chunks[layer]
    ]


def plan_shares(
    ffn_bytes: Sequence[int],
    num_ranks: int,
    mode: PoolMode,
    num_slots: int | None = None,
    order: FetchOrder = "peak-shift",
    slice_bytes: int = SLICE_BYTES,
    ship_bytes: int = 0,
    ship_below_rows: int = 0,
) -> tuple[PoolShare, ...]:
    """The share of every replica. Replicas of mode "none" are pools of one replica each.

    ``num_slots`` defaults to d-1 (SiDP, section 4). Raises MemoryPlanError for fewer than one.
    """
    if mode == "none":
        alone = PoolShare("none", rank=0, num_ranks=1, owners=(0,) * len(ffn_bytes))
        return (alone,) * num_ranks
    owners = assign_owners(ffn_bytes, num_ranks)
    if mode == "mapped":
        return tuple(PoolShare(mode, rank, num_ranks, owners) for rank in range(num_ranks))
    slots = max(1, num_ranks - 1) if num_slots is None else num_slots
    if slots < 1:
        raise MemoryPlanError(f"a streamed pool needs at least 1 slot, not {slots}: raise --slots")
    return tuple(
        PoolShare(
            mode,
            rank,
            num_ranks,
            owners,
            slots if num_ranks > 1 else 0,
            fetch_order(owners, ffn_bytes, rank, num_ranks, slots, order, slice_bytes),
            ship_below_rows if num_ranks > 1 else 0,
            ship_bytes if num_ranks > 1 else 0,
        )
        for rank in range(num_ranks)
    )
