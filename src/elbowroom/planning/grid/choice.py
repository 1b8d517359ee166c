"""The choice among plans: under overlap, and under a limit of memory.

Sums of weights run behind the backward: an iteration takes ``rest + max(0, weights - backward)``,
which is no sum over layers. But ``rest + price * (weights - backward)`` is one, for each price from
0 to 1, and never more than an iteration takes. Where its best plan has weights and backward take
the same time, or the price is at that end of the range, that plan is the best of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from elbowroom.core.errors import MemoryPlanError
from elbowroom.core.units import format_bytes
from elbowroom.planning.grid.explanation import GridTerms
from elbowroom.planning.grid.polish import polished
from elbowroom.planning.grid.problem import Choices, GridProblem

_PRICES = 8
"""Halvings of the range of prices of weights."""
_MEMORY_PRICES = 12
"""Halvings, in proportion, of the range of prices of memory, from this share of the dearest."""
_CHEAPEST = 1e-6
_POLISHED = 3
"""Candidates, the best ones, whose choices are changed one by one."""


class Candidate(NamedTuple):
    """Choices, what they cost, and whether none cost less."""

    choices: Choices
    total: GridTerms
    is_exact: bool = False


def hidden_seconds(total: GridTerms, overlap: bool) -> float:
    """Seconds of sums of weights that pass behind the backward."""
    return min(total.weights, total.backward) if overlap else 0.0


def judged_seconds(total: GridTerms, overlap: bool) -> float:
    """An iteration: products, communication, less what is hidden."""
    return total.compute + total.communication - hidden_seconds(total, overlap)


def choose(problem: GridProblem, others: Iterable[Sequence[int]] = ()) -> Candidate:
    """The best candidate that fits the workers' memory.

    ``others`` are choices that are judged too. Raises MemoryPlanError if none fits.
    """
    candidates = list(candidates_of(problem))
    best = _best(problem, candidates)
    limit = problem.settings.memory_bytes
    if best.is_exact and (limit is None or best.total.memory_bytes <= limit):
        return best
    candidates += [_candidate(problem, choices) for choices in others]
    if limit is not None:
        if _best(problem, candidates).total.memory_bytes > limit:
            candidates += _lean(problem, limit)
        candidates = [each for each in candidates if each.total.memory_bytes <= limit]
    ranked = sorted(candidates, key=lambda each: _seconds(problem, each))[:_POLISHED]
    changed = [_candidate(problem, polished(problem, each.choices)) for each in ranked]
    return _best(problem, [*ranked, *changed])


def candidates_of(problem: GridProblem, memory_price: float = 0.0) -> Iterator[Candidate]:
    """The best choices for prices of what weights take longer than the backward.

    The last is exact where nothing is hidden, or all.
    """
    dear = _solved(problem, 1.0, memory_price)
    hides = problem.settings.overlap and any((each.backward > 0).any() for each in problem.costs)
    if not hides or dear.total.weights >= dear.total.backward:
        yield dear
        return
    cheap = _solved(problem, 0.0, memory_price)
    yield cheap
    if cheap.total.weights <= cheap.total.backward:
        return
    yield dear._replace(is_exact=False)
    low, high = 0.0, 1.0
    for _ in range(_PRICES):
        price = (low + high) / 2
        between = _solved(problem, price, memory_price)
        yield between._replace(is_exact=False)
        if between.total.weights > between.total.backward:
            low = price
        else:
            high = price


def _lean(problem: GridProblem, limit: int) -> list[Candidate]:
    """Candidates near a limit of memory. Raises MemoryPlanError if even the leanest is over it."""
    leanest = tuple(int(costs.memory_bytes.argmin()) for costs in problem.costs)
    smallest = _candidate(problem, leanest)
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
        for _ in range(_MEMORY_PRICES):
            price = float(np.sqrt(low * high))
            candidate = _solved(problem, weights_price, price)
            found.append(candidate._replace(is_exact=False))
            if candidate.total.memory_bytes <= limit:
                high = price
            else:
                low = price
    return found


def _dearest(problem: GridProblem) -> float:
    """A price of a byte, in seconds, at which memory decides."""
    plain = _solved(problem, 1.0, 0.0).total
    leanest = sum(float(costs.memory_bytes.min()) for costs in problem.costs)
    spare = max(plain.memory_bytes - leanest, 1.0)
    return 100 * (plain.compute + plain.communication) / spare


def _solved(problem: GridProblem, weights_price: float, memory_price: float) -> Candidate:
    solution = problem.best(weights_price, memory_price)
    found = _candidate(problem, solution.choices)
    return found._replace(is_exact=solution.is_exact and memory_price == 0)


def _candidate(problem: GridProblem, choices: Sequence[int]) -> Candidate:
    return Candidate(tuple(choices), sum(problem.terms(choices), start=GridTerms()))


def _best(problem: GridProblem, candidates: Iterable[Candidate]) -> Candidate:
    return min(candidates, key=lambda each: _seconds(problem, each))


def _seconds(problem: GridProblem, candidate: Candidate) -> float:
    return judged_seconds(candidate.total, problem.settings.overlap)
