"""The least sum of costs over a graph: of each node's choice, and of the choices along each edge.

Nodes with one neighbour, or two, are removed: what they cost at best becomes a cost of their
neighbours. Chains and series-parallel graphs (residual blocks, nested skips) vanish so, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elbowroom.planning.grid.strategies import Floats


class Solution(NamedTuple):
    """A choice for each node; ``is_exact``: no others cost less."""

    choices: tuple[int, ...]
    is_exact: bool


class Followed(NamedTuple):
    """Another node, and for each of its choices the one that is alike; -1: none is."""

    node: int
    alike: NDArray[np.intp]


@dataclass(frozen=True)
class Costs:
    """What choices cost.

    Args:
        nodes: of each node, [choices]; inf: not allowed.
        edges: of pairs of nodes (a, b), a before b, [choices of a, choices of b].
        is_join: nodes that are removed after the others, so that branches alike stay alike.
        followed: for some nodes the one whose choice they may repeat where the graph is too tangled
            for more.

    """

    nodes: Sequence[Floats]
    edges: dict[tuple[int, int], Floats]
    is_join: Sequence[bool]
    followed: dict[int, Followed] = field(default_factory=dict)

    def total(self, choices: Sequence[int]) -> float:
        own = sum(float(node[choice]) for node, choice in zip(self.nodes, choices, strict=True))
        moves = (float(cost[choices[a], choices[b]]) for (a, b), cost in self.edges.items())
        return own + sum(moves)


class MinPlus:
    """Products and sums of matrices of costs, each pair computed once.

    Most layers of a network repeat; their matrices are the same objects, and so are results.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Floats, tuple[Floats, ...]]] = {}

    def through(self, before: Floats, node: Floats, behind: Floats) -> Floats:
        """Least of before[a, v] + node[v] + behind[v, b] over v."""

        def make() -> Floats:
            left, right = before + node, np.ascontiguousarray(behind)
            best = np.full((len(left), right.shape[1]), np.inf)
            for choice in np.flatnonzero(np.isfinite(node)):
                np.minimum(best, left[:, choice, None] + right[choice], out=best)
            return best

        return self._once("through", make, before, node, behind)

    def into(self, node: Floats, behind: Floats) -> Floats:
        """Least of node[v] + behind[v, b] over v."""
        return self._once("into", lambda: (node[:, None] + behind).min(axis=0), node, behind)

    def added(self, left: Floats, right: Floats) -> Floats:
        return self._once("added", lambda: left + right, left, right)

    def turned(self, matrix: Floats) -> Floats:
        return self._once("turned", lambda: matrix.T, matrix)

    def _once(self, what: str, make: Callable[[], Floats], *read: Floats) -> Floats:
        key = (what, *map(id, read))
        if key not in self._known:
            self._known[key] = make(), read  # holds what it read: no other gets its id
        return self._known[key][0]


@dataclass
class _Removed:
    """A node, what it cost, and the matrices [its choices, neighbour's choices]."""

    node: int
    costs: Floats
    neighbours: dict[int, Floats] = field(default_factory=dict)


def solve(costs: Costs) -> Solution:
    """The choices that cost least; where some node keeps more than two neighbours, nearly so."""
    return _Reduction(costs).solved()


class _Reduction:
    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._algebra = MinPlus()
        self._nodes = dict(enumerate(costs.nodes))
        self._around: dict[int, dict[int, Floats]] = {node: {} for node in self._nodes}
        for (a, b), matrix in costs.edges.items():
            self._join(a, b, matrix)

    def solved(self) -> Solution:
        removed, is_exact = [], True
        while self._nodes:
            node = min(self._nodes, key=self._order)
            if len(self._around[node]) > 2:
                is_exact = False
                removed.append(self._untangle(node))
            else:
                removed.append(self._remove(node))
        choices = [0] * len(removed)
        for each in reversed(removed):
            total = each.costs
            for neighbour, matrix in each.neighbours.items():
                total = total + matrix[:, choices[neighbour]]
            choices[each.node] = int(total.argmin())
        if not is_exact:
            choices = self._improved(choices)
        return Solution(tuple(choices), is_exact)

    def _order(self, node: int) -> tuple[int, bool, int]:
        return len(self._around[node]), self._costs.is_join[node], node

    def _join(self, a: int, b: int, matrix: Floats) -> None:
        """Add costs [choices of a, choices of b] to what is between two nodes."""
        known = self._around[a].get(b)
        both = matrix if known is None else self._algebra.added(known, matrix)
        self._around[a][b] = both
        self._around[b][a] = self._algebra.turned(both)

    def _take(self, node: int) -> _Removed:
        around = self._around.pop(node)
        for neighbour in around:
            del self._around[neighbour][node]
        return _Removed(node, self._nodes.pop(node), around)

    def _remove(self, node: int) -> _Removed:
        gone = self._take(node)
        match list(gone.neighbours.items()):
            case [(a, one)]:
                rest = self._algebra.into(gone.costs, one)
                self._nodes[a] = self._algebra.added(self._nodes[a], rest)
            case [(a, one), (b, two)]:
                a, b, one, two = (a, b, one, two) if a < b else (b, a, two, one)
                before = self._algebra.turned(one)
                self._join(a, b, self._algebra.through(before, gone.costs, two))
        return gone

    def _untangle(self, tangled: int) -> _Removed:
        """Remove a node with many neighbours: one that repeats another's choice, if any."""
        found = [
            node
            for node, followed in self._costs.followed.items()
            if followed.node in self._around.get(node, ())
        ]
        for node in sorted(found, key=self._order):
            if (gone := self._follow(node, self._costs.followed[node])) is not None:
                return gone
        return self._fix(tangled)

    def _follow(self, node: int, followed: Followed) -> _Removed | None:
        """Let a node choose what another does. None where that allows nothing."""
        source, alike = followed
        matrix = self._around[node][source]
        is_alike = alike >= 0
        own = self._nodes[node][alike] + matrix[alike, np.arange(len(alike))]
        total = self._nodes[source] + np.where(is_alike, own, np.inf)
        if not np.isfinite(total).any():
            return None
        gone = self._take(node)
        self._nodes[source] = total
        for neighbour, costs in gone.neighbours.items():
            if neighbour != source:
                self._join(source, neighbour, np.where(is_alike[:, None], costs[alike], np.inf))
        repeated = np.full_like(matrix, np.inf)
        repeated[alike[is_alike], np.flatnonzero(is_alike)] = 0.0
        return _Removed(node, np.zeros_like(gone.costs), {source: repeated})

    def _fix(self, node: int) -> _Removed:
        """Fix the choice of a node, as if each neighbour answered it at its best."""
        gone = self._take(node)
        hoped = gone.costs
        for neighbour, matrix in gone.neighbours.items():
            hoped = hoped + (matrix + self._nodes[neighbour]).min(axis=1)
        choice = int(hoped.argmin())
        for neighbour, matrix in gone.neighbours.items():
            self._nodes[neighbour] = self._nodes[neighbour] + matrix[choice]
        fixed = np.full_like(gone.costs, np.inf)
        fixed[choice] = 0.0
        return _Removed(node, fixed)

    def _improved(self, choices: list[int]) -> list[int]:
        """Change one node's choice at a time, as long as it helps."""
        edges = self._costs.edges
        while True:
            before = self._costs.total(choices)
            for node, own in enumerate(self._costs.nodes):
                total = own.copy()
                for (a, b), matrix in edges.items():
                    if a == node:
                        total += matrix[:, choices[b]]
                    elif b == node:
                        total += matrix[choices[a]]
                choices[node] = int(total.argmin())
            if self._costs.total(choices) >= before * (1 - 1e-12):
                return choices
