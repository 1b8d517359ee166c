"""Samples of unlike length shared out over the microbatches of a minibatch.

A sample of l tokens costs l + l^2 / c: what each token costs by itself, and what each pair does.
In a padded microbatch every row costs as much as the longest. A pipeline waits for its costliest
microbatch, so rows of like length belong together, and fewer of the long ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from elbowroom.core.errors import InputError

Assignment = list[list[int]]
"""For each microbatch the numbers of its samples."""

Method = Literal["even-cost", "equal-numbers", "as-they-come", "packed"]
METHODS: tuple[Method, ...] = get_args(Method)


class Measured(NamedTuple):
    """Seconds for each sample of so many tokens, forward and backward.

    Measure equally many tokens of each length, in more rows of the shorter ones: what a pass costs
    by itself would count for the short ones otherwise.
    """

    length: int
    seconds: float


def sample_cost(length: int, crossover: float = math.inf) -> float:
    """Cost of a sample, in tokens of a short one: l + l^2 / c."""
    return length + length**2 / crossover


def padded_cost(lengths: Sequence[int], crossover: float = math.inf) -> float:
    """Cost of a microbatch of samples of these lengths, all padded to the longest."""
    return len(lengths) * sample_cost(max(lengths), crossover)


def crossover_of(measured: Sequence[Measured]) -> float:
    """The length c at which pairs of tokens cost as much as the tokens, from measurements.

    Least squares of seconds per token, which are a + (a / c) l. Infinite where they do not grow.
    Raises InputError for fewer than two lengths, and seconds that fall to nothing at length 0.
    """
    points = [(one.length, one.seconds / one.length) for one in measured]
    if len({length for length, _ in points}) < 2:
        raise InputError("a crossover needs measurements of at least two lengths")
    mean_length = math.fsum(length for length, _ in points) / len(points)
    mean_rate = math.fsum(rate for _, rate in points) / len(points)
    spread = math.fsum((length - mean_length) ** 2 for length, _ in points)
    slope = math.fsum((length - mean_length) * (rate - mean_rate) for length, rate in points)
    slope /= spread
    if slope <= 0:
        return math.inf
    per_token = mean_rate - slope * mean_length
    if per_token <= 0:
        raise InputError(
            f"seconds per token grow by {slope:.3g} a token, from nothing: measure shorter samples"
        )
    return per_token / slope


def balanced_microbatches(
    lengths: Sequence[int],
    count: int,
    *,
    crossover: float = math.inf,
    method: Method = "even-cost",
) -> Assignment:
    """Share samples out over ``count`` microbatches; each sample is in one, none is empty.

    Args:
        lengths: tokens of each sample.
        count: the number of microbatches, at most as many as there are samples.
        crossover: length at which attention costs as much as all that grows with the length
            alone; about 6 times the width in a transformer of plain blocks. By default attention
            costs nothing.
        method: ``even-cost`` takes runs of the samples sorted by length such that the costliest
            microbatch, padded to its longest sample, costs the least that is possible.
            ``equal-numbers`` sorts too, and ``as-they-come`` does not; their microbatches have
            equal numbers of samples, to one. ``packed`` evens out the costs of the samples
            themselves, for models that take them one behind the other, without padding.

    Returns the numbers of each microbatch's samples; the longest first, but for ``as-they-come``.
    Raises InputError for counts, lengths and crossovers that are less than 1.

    """
    _check(lengths, count, crossover, method)
    costs = [sample_cost(length, crossover) for length in lengths]
    order = list(range(len(lengths)))
    if method == "as-they-come":
        return _runs(order, _equal_bounds(len(order), count))
    order.sort(key=lambda sample: -lengths[sample])
    if method == "packed":
        return _packed(order, costs, count)
    if method == "equal-numbers":
        return _runs(order, _equal_bounds(len(order), count))
    return _runs(order, _even_bounds([costs[sample] for sample in order], count))


def _check(lengths: Sequence[int], count: int, crossover: float, method: str) -> None:
    if method not in METHODS:
        raise InputError(f"method '{method}' is not one of {', '.join(METHODS)}")
    if not 1 <= count <= len(lengths):
        raise InputError(
            f"{len(lengths)} samples in {count} microbatches: give at least 1 microbatch, and a "
            "sample for each"
        )
    if min(lengths) < 1 or not crossover >= 1:
        raise InputError(
            f"the shortest sample has {min(lengths)} tokens, the crossover is {crossover}: give 1 "
            "or more"
        )


def _runs(order: Sequence[int], bounds: Sequence[int]) -> Assignment:
    return [list(order[begin:end]) for begin, end in pairwise(bounds)]


def _equal_bounds(num_samples: int, count: int) -> list[int]:
    return [num_samples * number // count for number in range(count + 1)]


def _packed(order: Sequence[int], costs: Sequence[float], count: int) -> Assignment:
    """Longest processing time first (Graham 1969): each to the microbatch that has least so far."""
    microbatches: Assignment = [[] for _ in range(count)]
    loads = [(0.0, number) for number in range(count)]
    for sample in order:
        load, number = heapq.heappop(loads)
        microbatches[number].append(sample)
        heapq.heappush(loads, (load + costs[sample], number))
    return microbatches


def _even_bounds(costs: Sequence[float], count: int) -> list[int]:
    """Bounds of ``count`` runs of falling costs; the costliest run is as cheap as can be.

    A run of n samples costs n times its first. If runs of at most some limit suffice, so do those
    that each take all they can: a bisection of the limit, down to neighbouring numbers, is exact.
    """
    best = _equal_bounds(len(costs), count)
    low, high = 0.0, _costliest(costs, best)
    while low < (limit := (low + high) / 2) < high:
        bounds = _greedy_bounds(costs, count, limit)
        if bounds is None:
            low = limit
        else:
            best, high = bounds, _costliest(costs, bounds)
    return _filled(costs, best, count)


def _costliest(costs: Sequence[float], bounds: Sequence[int]) -> float:
    return max((end - begin) * costs[begin] for begin, end in pairwise(bounds))


def _greedy_bounds(costs: Sequence[float], count: int, limit: float) -> list[int] | None:
    """Bounds of runs that each take all they can within a limit; None if ``count`` are too few."""
    bounds = [0]
    while (begin := bounds[-1]) < len(costs):
        num_samples = int(limit / costs[begin]) + 1
        while num_samples * costs[begin] > limit:  # quotients are rounded either way
            num_samples -= 1
        if num_samples < 1 or len(bounds) > count:
            return None
        bounds.append(min(begin + num_samples, len(costs)))
    return bounds


def _filled(costs: Sequence[float], bounds: list[int], count: int) -> list[int]:
    """The same bounds and more, until there are ``count`` runs: the costliest are halved."""
    while len(bounds) <= count:
        runs = [(begin, end) for begin, end in pairwise(bounds) if end - begin > 1]
        begin, end = max(runs, key=lambda run: (run[1] - run[0]) * costs[run[0]])
        bounds = sorted([*bounds, (begin + end) // 2])
    return bounds
