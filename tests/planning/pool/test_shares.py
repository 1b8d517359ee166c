"""Owners and fetch orders: balanced, complete, and never waiting for themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import MemoryPlanError
from elbowroom.planning.pool.shares import SLICE_BYTES, assign_owners, fetch_order, plan_shares
from elbowroom.plans.pool import FETCH_ORDERS, FetchOrder
from elbowroom.plans.pool_actions import Fetch

SIZES = st.lists(st.integers(1, 3 * SLICE_BYTES), min_size=1, max_size=20)
RANKS = st.integers(1, 6)
ORDERS = st.sampled_from(FETCH_ORDERS)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_equal_layers_go_round_the_ranks(num_ranks: int) -> None:
    owners = assign_owners([7] * 6, num_ranks)
    assert owners == tuple(layer % num_ranks for layer in range(6))


def test_unequal_layers_are_balanced_by_bytes() -> None:
    sizes = [1, 9] * 8
    owners = assign_owners(sizes, 2)
    held = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert held == [40, 40], "dealing l mod d would give 8 and 72"


@given(SIZES, RANKS)
def test_every_layer_has_one_owner_and_no_rank_two_of_a_cycle(
    sizes: list[int], num_ranks: int
) -> None:
    owners = assign_owners(sizes, num_ranks)
    assert len(owners) == len(sizes)
    assert set(owners) <= set(range(num_ranks))
    for start in range(0, len(sizes), num_ranks):
        cycle = owners[start : start + num_ranks]
        assert len(set(cycle)) == len(cycle)
    held = Counter[int]()
    for owner, size in zip(owners, sizes, strict=True):
        held[owner] += size
    assert max(held.values()) - min(held[rank] for rank in range(num_ranks)) <= max(sizes)


def test_more_ranks_than_layers() -> None:
    shares = plan_shares((5, 5), 4, "streamed")
    assert shares[0].owners == (0, 1)
    assert {fetch.layer for fetch in shares[3].fetches} == {0, 1}
    assert {fetch.layer for fetch in shares[0].fetches} == {1}


@given(SIZES, RANKS, st.integers(1, 6), ORDERS)
def test_order_never_waits_for_itself(
    sizes: list[int], num_ranks: int, num_slots: int, order: FetchOrder
) -> None:
    owners = assign_owners(sizes, num_ranks)
    for rank in range(num_ranks):
        fetches = fetch_order(owners, sizes, rank, num_ranks, num_slots, order)
        borrowed = [layer for layer, owner in enumerate(owners) if owner != rank]
        _replay(fetches, borrowed, num_slots, num_passes=3)


def _replay(fetches: Sequence[Fetch], borrowed: list[int], num_slots: int, num_passes: int) -> None:
    """Play the housekeeper against compute; fails where both would wait for each other."""
    uses = iter(borrowed * num_passes)
    held: dict[int, int] = {}  # layer -> chunks still to come
    for fetch in [*fetches] * num_passes:
        if fetch.chunk == 0:
            while len(held) == num_slots or fetch.layer in held:
                wanted = next(uses)
                assert held.get(wanted) == 0, f"deadlock: {wanted} wanted, slots hold {held}"
                del held[wanted]
            held[fetch.layer] = fetch.num_chunks
        assert fetch.chunk == fetch.num_chunks - held[fetch.layer], "chunks out of order"
        held[fetch.layer] -= 1
    rest = list(uses)
    assert set(rest) == set(held), "a layer is wanted that was not fetched, or the reverse"
    assert not any(held.values())


@given(SIZES, RANKS, st.integers(1, 6), ORDERS)
def test_every_borrowed_layer_is_fetched_once_and_whole(
    sizes: list[int], num_ranks: int, num_slots: int, order: FetchOrder
) -> None:
    for share in plan_shares(tuple(sizes), num_ranks, "streamed", num_slots, order):
        chunks: dict[int, list[int]] = {}
        for fetch in share.fetches:
            chunks.setdefault(fetch.layer, []).append(fetch.chunk)
            assert fetch.num_chunks == (_slices(sizes[fetch.layer]) if order == "sliced" else 1)
        borrowed = [layer for layer, owner in enumerate(share.owners) if owner != share.rank]
        assert sorted(chunks) == borrowed
        for layer, seen in chunks.items():
            wanted = _slices(sizes[layer]) if order == "sliced" else 1
            assert seen == list(range(wanted))


def _slices(num_bytes: int) -> int:
    return -(-num_bytes // SLICE_BYTES)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_readers_do_not_meet_equal_layers(num_ranks: int) -> None:
    _check_no_meeting([10] * (3 * num_ranks), num_ranks)


@given(st.lists(st.integers(1, 9), min_size=12, max_size=12), st.sampled_from([2, 3, 4]))
def test_readers_do_not_meet_unequal_layers(sizes: list[int], num_ranks: int) -> None:
    _check_no_meeting(sizes, num_ranks)


def _check_no_meeting(sizes: list[int], num_ranks: int) -> None:
    """With d-1 slots, no two ranks begin a cycle at the same owner (peak shifting)."""
    shares = plan_shares(tuple(sizes), num_ranks, "streamed")
    for start in range(0, len(sizes), num_ranks):
        cycle = range(start, start + num_ranks)
        firsts = [next(f.layer for f in share.fetches if f.layer in cycle) for share in shares]
        owners = [shares[0].owners[layer] for layer in firsts]
        assert len(set(owners)) == num_ranks, f"cycle {start}: ranks begin at owners {owners}"


def test_sliced_takes_turns() -> None:
    fetches = fetch_order([0, 1, 2], [3 * SLICE_BYTES] * 3, 0, 3, 2, "sliced")
    assert [fetch.layer for fetch in fetches] == [1, 2] * 3


def test_modes() -> None:
    none, mapped = plan_shares((1, 1), 2, "none"), plan_shares((1, 1), 2, "mapped")
    assert [share.owners for share in none] == [(0, 0)] * 2
    assert {share.num_ranks for share in none} == {1}
    assert [share.rank for share in mapped] == [0, 1]
    assert not any(share.fetches or share.num_slots for share in none + mapped)


def test_streaming_needs_a_slot() -> None:
    with pytest.raises(MemoryPlanError, match="at least 1 slot, not 0: raise --slots"):
        plan_shares((1, 1), 2, "streamed", 0)
