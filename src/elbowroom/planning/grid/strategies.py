"""Ways to split one layer over the workers: parts of the batch, of space, outputs and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.layer_shapes import LayerShape
from elbowroom.planning.grid.blocks import Block, BlockGraph
from elbowroom.planning.grid.settings import Forms
from elbowroom.plans.grid import LayerGrid

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_MOST_FEATURE_PARTS = 16
"""Of a layer that is split in space too, in a graph that is no chain, where there are too many."""
_MANY = 500
"""Strategies of a layer from which on some are left out."""


@dataclass(frozen=True, eq=False)
class Strategies:
    """Ways to split one layer, one in each row.

    Args:
        batch, outputs, inputs: parts, [strategies]. For a layer without weights ``inputs`` are
            replicas.
        is_complete: whether none that is allowed was left out.
        space: parts of each dimension of space, [strategies, dimensions].

    """

    batch: Floats
    space: Floats
    outputs: Floats
    inputs: Floats
    is_complete: bool = True

    @property
    def count(self) -> int:
        return len(self.batch)

    @property
    def area(self) -> Floats:
        """Parts of space, all its dimensions together."""
        return np.asarray(self.space.prod(axis=1))

    @property
    def size(self) -> Floats:
        return self.batch * self.area * self.outputs * self.inputs

    def grid(self, row: int, name: str, has_inputs: bool) -> LayerGrid:
        """One of them, as a plan names it."""
        return LayerGrid(
            name,
            int(self.batch[row]),
            tuple(int(parts) for parts in self.space[row]),
            int(self.outputs[row]),
            int(self.inputs[row]) if has_inputs else 1,
        )

    def row_of(self, grid: LayerGrid) -> int | None:
        """The first that splits a layer as a grid does; for one without weights ``inputs`` is 1."""
        is_same = (self.batch == grid.batch) & (self.outputs == grid.outputs)
        if grid.inputs > 1:
            is_same &= self.inputs == grid.inputs
        space = grid.space or (1,) * self.space.shape[1]
        if len(space) != self.space.shape[1]:
            return None
        found = np.flatnonzero(is_same & (self.space == space).all(axis=1))
        return int(found[0]) if found.size else None

    @staticmethod
    def of(rows: list[tuple[int, tuple[int, ...], int, int]]) -> Strategies:
        """From rows of (batch, space, outputs, inputs)."""
        batch, space, outputs, inputs = zip(*rows, strict=True)
        dims = len(space[0])
        return Strategies(
            np.array(batch, float),
            np.array(space, float).reshape(len(rows), dims),
            np.array(outputs, float),
            np.array(inputs, float),
        )


def all_strategies(
    graph: BlockGraph, procs: int, batch: int, forms: Forms
) -> tuple[Strategies, ...]:
    """What each block may be split into; blocks alike share one object."""
    known: dict[tuple[object, ...], Strategies] = {}
    found = []
    for block in graph.blocks:
        limits = tuple(_most_parts(each) for each, _ in block.followers)
        head, kinds = block.head, (block.kind, block.head.kind)
        inputs = (block.num_inputs, block.input_unit)
        key = (*kinds, head.num_features, head.space_sizes, head.groups, *inputs, limits)
        if key not in known:
            known[key] = strategies_of(block, procs, batch, forms, graph.is_chain)
        found.append(known[key])
    return tuple(found)


def strategies_of(
    block: Block, procs: int, batch: int, forms: Forms, is_chain: bool = True
) -> Strategies:
    """What a block may be split into, all workers used where some way uses them.

    Every part of the batch has a sample, every part of space a row, every part of features one.
    Where no way uses all workers, the ways that use most of them: the others compute the same.
    """
    for used in reversed(divisors(procs)):
        rows = [
            (b, space_split(s, block.head.space_sizes), o, i)
            for b, s, o, i in _factorings(used, 4)
            if _is_allowed(block, forms, b, s, o, i, batch)
        ]
        rows = [row for row in rows if _has_rows(block, row[1])]
        if not rows:
            continue
        if is_chain or len(rows) <= _MANY:
            return Strategies.of(rows)
        return replace(Strategies.of([row for row in rows if _is_usual(*row)]), is_complete=False)
    raise AssertionError("one worker can compute any layer")


def space_split(parts: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """``parts`` over the dimensions of space, as even as possible.

    Each prime factor, the smallest first, goes to the dimension whose parts have most rows.
    """
    split = [1] * len(sizes)
    for prime in _primes(parts) if sizes else ():
        split[max(range(len(sizes)), key=lambda dim: (sizes[dim] / split[dim], -dim))] *= prime
    return tuple(split)


def _is_allowed(block: Block, forms: Forms, b: int, s: int, o: int, i: int, batch: int) -> bool:
    head = block.head
    if b > batch or (s > 1 and not head.space):
        return False
    if block.kind == "whole":
        return b == s == o == i == 1
    if any(o > 1 and _most_parts(each) % o for each, _ in block.followers):
        return False
    if block.kind == "plain":
        return o <= head.num_features and (s == 1 or head.kind != "dot_attention")
    if head.kind == "attention":
        return s == i == 1 and o <= head.groups
    if head.kind == "embedding":
        return s == i == 1 and o <= head.num_features
    if block.is_convolution and (forms == "linear" or head.groups > 1):
        return o == i == 1
    if forms == "linear" and s > 1:
        return False
    if i > 1 and block.input_unit % i:
        return False
    return o <= head.num_features and i <= block.num_inputs


def _most_parts(layer: LayerShape) -> int:
    """Into how many parts a layer without weights lets its features be split; 0: any."""
    if layer.kind in ("cat", "layer_norm"):
        return 1
    if layer.kind == "dot_attention":
        return layer.num_features if layer.features == 1 else 1
    return layer.groups if layer.kind == "group_norm" else 0


def _has_rows(block: Block, space: tuple[int, ...]) -> bool:
    return all(n >= parts for n, parts in zip(block.head.space_sizes, space, strict=True))


def _is_usual(b: int, space: tuple[int, ...], o: int, i: int) -> bool:
    return o * i <= _MOST_FEATURE_PARTS or prod(space) == 1


@lru_cache(maxsize=64)
def _factorings(number: int, count: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write a number as a product of ``count`` factors, in order."""
    if count == 1:
        return ((number,),)
    return tuple(
        (first, *rest)
        for first in divisors(number)
        for rest in _factorings(number // first, count - 1)
    )


@lru_cache(maxsize=256)
def divisors(number: int) -> tuple[int, ...]:
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def _primes(number: int) -> list[int]:
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found
