"""Changes of one block's grid at a time, as long as an iteration gets shorter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.problem import Choices, GridProblem
from elbowroom.planning.grid.strategies import Floats

_ENOUGH = 1e-9
"""A gain below this share ends it."""


def polished(problem: GridProblem, choices: Sequence[int]) -> Choices:
    """Choices that no change of a single block's makes better, within the limit of memory."""
    descent = _Descent(problem, list(choices))
    before = np.inf
    while descent.seconds < before * (1 - _ENOUGH):
        before = descent.seconds
        for block in range(len(choices)):
            descent.improve(block)
    return tuple(descent.choices)


class _Descent:
    """Choices, with the sums over all blocks that an iteration's seconds depend on."""

    def __init__(self, problem: GridProblem, choices: list[int]) -> None:
        self.choices = choices
        self._problem = problem
        self._edges: list[list[int]] = [[] for _ in choices]
        for number, edge in enumerate(problem.graph.edges):
            self._edges[edge.source].append(number)
            self._edges[edge.target].append(number)
        total = sum(problem.terms(choices), start=GridTerms())
        self._weights, self._backward = total.weights, total.backward
        self._memory = total.memory_bytes
        self._rest = total.communication - total.weights + total.forward
        self.seconds = float(self._judged(self._rest, self._weights, self._backward))

    def improve(self, block: int) -> None:
        """Take the block's best choice, the others' as they are."""
        costs, row = self._problem.costs[block], self.choices[block]
        rest = costs.rest + self._moves(block)
        rests = self._rest + rest - rest[row]
        weights = self._weights + costs.weights - costs.weights[row]
        backward = self._backward + costs.backward - costs.backward[row]
        memory = self._memory + costs.memory_bytes - costs.memory_bytes[row]
        seconds = self._judged(rests, weights, backward)
        limit = self._problem.settings.memory_bytes
        if limit is not None:
            seconds = np.where(memory <= limit, seconds, np.inf)
        best = int(seconds.argmin())
        if seconds[best] < self.seconds:
            self.choices[block], self.seconds = best, float(seconds[best])
            self._rest, self._weights = float(rests[best]), float(weights[best])
            self._backward, self._memory = float(backward[best]), float(memory[best])

    def _moves(self, block: int) -> Floats:
        """Seconds of the moves from and to a block, for each of its choices."""
        total = np.zeros(len(self._problem.costs[block].weights))
        for number in self._edges[block]:
            edge, matrix = self._problem.graph.edges[number], self._problem.moves[number]
            is_source = edge.source == block
            other = self.choices[edge.target if is_source else edge.source]
            total += matrix[:, other] if is_source else matrix[other]
        return total

    def _judged(
        self, rest: Floats | float, weights: Floats | float, backward: Floats | float
    ) -> Floats:
        overlap = self._problem.settings.overlap
        hidden = np.minimum(weights, backward) if overlap else 0.0
        return np.asarray(rest + weights + backward - hidden)
