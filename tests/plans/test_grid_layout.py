"""Moves with sums: replicas add up the same summands in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import pytest

from elbowroom.plans.grid_layout import Box, Layout, move_between, prime_factors, whole

SHAPE = (24, 24)


def sums(procs: int) -> Iterator[tuple[Layout, Layout, tuple[int, ...]]]:
    """Sums over some digits of a worker's number, left whole, or scattered."""
    source = whole(range(procs), len(SHAPE))
    digits = range(len(prime_factors(procs)))
    for count in digits:
        for pending in permutations(digits, count + 1):
            yield source, source, pending
            yield source, source.scattered(pending, (1, 1), SHAPE), pending


@pytest.mark.parametrize("procs", [4, 6, 8, 12])
def test_replicas_add_in_one_order(procs: int) -> None:
    for source, target, pending in sums(procs):
        orders: dict[Box, set[tuple[int, ...]]] = {}
        pieces = move_between(source, target, SHAPE, pending).pieces
        for worker in target.workers:
            order = tuple(
                source.number(giver, pending) for giver, taker in pieces if taker == worker
            )
            assert len(order) == source.product(pending)
            orders.setdefault(target.box(worker, SHAPE), set()).add(order)
        assert all(len(found) == 1 for found in orders.values()), (target, pending)
