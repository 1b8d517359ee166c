"""The least sum over a graph is found, and how is known."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.planning.grid.reduction import Costs, Followed, solve

RESIDUAL = ((0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (2, 4))
NESTED = ((0, 1), (1, 2), (2, 3), (1, 3), (3, 4), (0, 4))
COMPLETE = tuple((a, b) for a in range(5) for b in range(a + 1, 5))
TREE = ((0, 1), (0, 2), (0, 3), (3, 4))


def random_costs(seed: int, pairs: tuple[tuple[int, int], ...], joins: bool) -> Costs:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 5, 5)
    nodes = [generator.random(count) for count in counts]
    for node in nodes:
        node[generator.random(len(node)) < 0.2] = np.inf
        node[generator.integers(len(node))] = 0.5
    edges = {(a, b): generator.random((counts[a], counts[b])) for a, b in pairs}
    followed = {}
    if joins:
        alike = generator.integers(-1, counts[4], counts[0])
        followed = {4: Followed(0, alike)}
    return Costs(nodes, edges, [joins] * 5, followed)


def least(costs: Costs) -> float:
    return min(costs.total(each) for each in product(*(range(len(n)) for n in costs.nodes)))


@pytest.mark.parametrize("pairs", [RESIDUAL, NESTED, TREE, ()])
@given(seed=st.integers(0, 10**6), joins=st.booleans())
def test_graphs_that_reduce_are_solved_exactly(
    pairs: tuple[tuple[int, int], ...], seed: int, joins: bool
) -> None:
    costs = random_costs(seed, pairs, joins)
    solution = solve(costs)
    assert solution.is_exact
    assert costs.total(solution.choices) == pytest.approx(least(costs), abs=1e-12)


@given(seed=st.integers(0, 10**6), joins=st.booleans())
def test_tangled_graphs_are_solved_nearly(seed: int, joins: bool) -> None:
    costs = random_costs(seed, COMPLETE, joins)
    solution = solve(costs)
    total = costs.total(solution.choices)
    assert not solution.is_exact
    assert np.isfinite(total)
    for node, count in enumerate(map(len, costs.nodes)):  # no single change helps
        for choice in range(count):
            other = [*solution.choices]
            other[node] = choice
            assert costs.total(other) >= total * (1 - 1e-9)
