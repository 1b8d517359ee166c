"""Assignments of samples to microbatches, against all there are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elbowroom
from elbowroom.core.errors import InputError
from elbowroom.planning.microbatches import (
    METHODS,
    Assignment,
    Measured,
    Method,
    balanced_microbatches,
    crossover_of,
    padded_cost,
    sample_cost,
)
from tests.examples import examples

LENGTHS = st.lists(st.integers(1, 12) | st.integers(1, 5000), min_size=1, max_size=40)
CROSSOVERS = st.sampled_from([math.inf, 1.0, 7.3, 384.0])


def costliest(lengths: Sequence[int], microbatches: Assignment, crossover: float) -> float:
    return max(padded_cost([lengths[k] for k in rows], crossover) for rows in microbatches)


def partitions(samples: list[int], count: int) -> Iterator[Assignment]:
    """All ways to put samples into ``count`` sets, none of them empty."""
    if count > len(samples):
        return
    if not samples:
        yield []
        return
    first, rest = samples[0], samples[1:]
    if count:
        for found in partitions(rest, count - 1):
            yield [[first], *found]
        for found in partitions(rest, count):
            for k in range(len(found)):
                yield [*found[:k], [first, *found[k]], *found[k + 1 :]]


@examples(200)
@given(LENGTHS, st.data(), CROSSOVERS)
def test_each_sample_is_in_one_microbatch(
    lengths: list[int], data: st.DataObject, crossover: float
) -> None:
    count = data.draw(st.integers(1, len(lengths)))
    for method in METHODS:
        found = balanced_microbatches(lengths, count, crossover=crossover, method=method)
        assert len(found) == count
        assert all(found)
        assert sorted(chain.from_iterable(found)) == list(range(len(lengths)))


@examples(200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.data(), CROSSOVERS)
def test_even_cost_is_the_best_of_all_partitions(
    lengths: list[int], data: st.DataObject, crossover: float
) -> None:
    """Not only of runs of the sorted samples."""
    count = data.draw(st.integers(1, len(lengths)))
    every = list(partitions(list(range(len(lengths))), count))
    best = min(costliest(lengths, one, crossover) for one in every)
    found = balanced_microbatches(lengths, count, crossover=crossover)
    assert costliest(lengths, found, crossover) == best


@pytest.mark.parametrize("seed", range(30))
def test_even_cost_is_the_best_of_all_runs(seed: int) -> None:
    """With as many candidates as they take to differ by little."""
    generator = random.Random(seed)
    lengths = [round(generator.lognormvariate(6, 0.8)) + 1 for _ in range(14)]
    order = sorted(range(14), key=lambda k: lengths[k])
    for count in (2, 3, 4, 5):
        ends = combinations(range(1, 14), count - 1)
        every = ([order[a:b] for a, b in pairwise((0, *each, 14))] for each in ends)
        best = min(costliest(lengths, one, 384.0) for one in every)
        found = balanced_microbatches(lengths, count, crossover=384.0)
        assert costliest(lengths, found, 384.0) == best


@examples(200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.data(), CROSSOVERS)
def test_packed_is_within_grahams_bound(
    lengths: list[int], data: st.DataObject, crossover: float
) -> None:
    """At most 4/3 - 1/(3 K) of the best partition."""
    count = data.draw(st.integers(1, len(lengths)))

    def load(microbatches: Assignment) -> float:
        return max(sum(sample_cost(lengths[k], crossover) for k in rows) for rows in microbatches)

    best = min(map(load, partitions(list(range(len(lengths))), count)))
    found = balanced_microbatches(lengths, count, crossover=crossover, method="packed")
    assert load(found) <= (4 / 3 - 1 / (3 * count)) * best * (1 + 1e-9)


def test_equal_numbers() -> None:
    lengths = [3, 9, 1, 7, 5]
    come = balanced_microbatches(lengths, 2, method="as-they-come")
    assert come == [[0, 1], [2, 3, 4]]
    ranked = balanced_microbatches(lengths, 2, method="equal-numbers")
    assert ranked == [[1, 3], [4, 0, 2]]


def test_one_long_sample_stands_alone() -> None:
    """Attention alone makes the difference: 100 tokens are as many as 10 times 10."""
    lengths = [100, *[10] * 20]
    linear = elbowroom.balanced_microbatches(lengths, 3)
    assert [len(rows) for rows in linear] == [1, 10, 10]
    square = elbowroom.balanced_microbatches(lengths, 3, crossover=1)
    assert square[0] == [0]
    assert costliest(lengths, square, 1) == 100 + 100**2


def test_crossover() -> None:
    """Of seconds that are exactly a (l + l^2 / c)."""
    measured = [Measured(n, 2e-3 * sample_cost(n, 384.0)) for n in (32, 100, 700)]
    assert crossover_of(measured) == pytest.approx(384.0)
    assert crossover_of([Measured(10, 1.0), Measured(20, 1.9)]) == math.inf


@pytest.mark.parametrize(
    ("lengths", "count", "crossover", "method"),
    [
        ([], 1, 2.0, "packed"),
        ([5, 5], 3, 2.0, "packed"),
        ([5, 5], 0, 2.0, "packed"),
        ([5, 0], 1, 2.0, "even-cost"),
        ([5, 5], 1, 0.5, "even-cost"),
        ([5, 5], 1, math.nan, "even-cost"),
        ([5, 5], 1, 2.0, "longest"),
    ],
)
def test_what_is_refused(lengths: list[int], count: int, crossover: float, method: Method) -> None:
    with pytest.raises(InputError):
        balanced_microbatches(lengths, count, crossover=crossover, method=method)


@pytest.mark.parametrize(
    "measured", [[], [Measured(8, 1.0)], [Measured(8, 1.0), Measured(16, 4.0)]], ids=len
)
def test_crossovers_that_cannot_be_told(measured: list[Measured]) -> None:
    with pytest.raises(InputError):
        crossover_of(measured)
