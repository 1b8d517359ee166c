"""The choice among plans: prices are put on sums of weights and on memory, and candidates judged.

Sums of weights run behind the backward, so what they cost depends on all layers together, which no
sum over layers says. A plan is found for each of several prices of them, and judged as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.units import format_bytes
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.problem import Choices, GridProblem

WEIGHTS_PRICES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0)
"""Shares of their seconds at which sums of weights are priced in turn."""
_MEMORY_STEPS = 12
"""Halvings of the range of prices of memory, which begins at this share of the dearest."""
_CHEAPEST = 1e-6


class Candidate(NamedTuple):
    """Choices, what they cost, and whether none would cost less for the price they were found."""

    choices: Choices
    total: GridTerms
    is_exact: bool


def hidden_seconds(total: GridTerms, overlap: bool) -> float:
    """Seconds of sums of weights that pass behind the backward."""
    return min(total.weights, total.backward) if overlap else 0.0


def judged_seconds(total: GridTerms, overlap: bool) -> float:
    """An iteration: products, communication, less what is hidden."""
    return total.compute + total.communication - hidden_seconds(total, overlap)


def weights_prices(problem: GridProblem) -> tuple[float, ...]:
    """Prices to try: the full one is right where nothing is hidden."""
    has_products = any((costs.backward > 0).any() for costs in problem.costs)
    return WEIGHTS_PRICES if problem.settings.overlap and has_products else (1.0,)


def choose(problem: GridProblem, others: Iterable[Sequence[int]] = ()) -> Candidate:
    """The best candidate that fits the workers' memory.

    ``others`` are choices that are judged too. Raises MemoryPlanError if none fits.
    """
    settings = problem.settings
    candidates = [_solved(problem, price) for price in weights_prices(problem)]
    candidates += [_candidate(problem, choices, True) for choices in others]
    limit = settings.memory_bytes
    if limit is None:
        return _best(problem, candidates)
    if _best(problem, candidates).total.memory_bytes > limit:
        candidates += _lean(problem, limit)
    fitting = [each for each in candidates if each.total.memory_bytes <= limit]
    return _best(problem, fitting)


def _lean(problem: GridProblem, limit: int) -> list[Candidate]:
    """Candidates near a limit of memory. Raises MemoryPlanError if even the leanest is over it."""
    leanest = tuple(int(costs.memory_bytes.argmin()) for costs in problem.costs)
    smallest = _candidate(problem, leanest, False)
    settings = problem.settings
    if smallest.total.memory_bytes > limit:
        raise MemoryPlanError(
            f"the smallest plan for {settings.procs} workers and a batch of {settings.batch} needs "
            f"{format_bytes(round(smallest.total.memory_bytes))} a worker, and the limit is "
            f"{format_bytes(limit)}: give more workers, more memory or a smaller batch"
        )
    found = [smallest]
    for weights_price in (1.0, 0.0) if settings.overlap else (1.0,):
        high = _dearest(problem)
        low = high * _CHEAPEST
        for _ in range(_MEMORY_STEPS):
            price = float(np.sqrt(low * high))
            candidate = _solved(problem, weights_price, price)
            found.append(candidate)
            if candidate.total.memory_bytes <= limit:
                high = price
            else:
                low = price
    return found


def _dearest(problem: GridProblem) -> float:
    """A price of a byte, in seconds, at which memory decides."""
    plain = _solved(problem, 1.0).total
    leanest = sum(float(costs.memory_bytes.min()) for costs in problem.costs)
    spare = max(plain.memory_bytes - leanest, 1.0)
    return 100 * (plain.compute + plain.communication) / spare


def _solved(problem: GridProblem, weights_price: float, memory_price: float = 0.0) -> Candidate:
    solution = problem.best(weights_price, memory_price)
    return _candidate(problem, solution.choices, solution.is_exact)


def _candidate(problem: GridProblem, choices: Sequence[int], is_exact: bool) -> Candidate:
    total = sum(problem.terms(choices), start=GridTerms())
    return Candidate(tuple(choices), total, is_exact)


def _best(problem: GridProblem, candidates: Iterable[Candidate]) -> Candidate:
    overlap = problem.settings.overlap
    return min(candidates, key=lambda each: judged_seconds(each.total, overlap))
