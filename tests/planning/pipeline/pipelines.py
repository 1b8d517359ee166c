"""Layer graphs for tests, and the naive planner that the real one is held against.

It tries every chain of cuts and every number of replicas, straight from the formulas of the paper,
and knows nothing of how the planner works.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest

from elbowroom.core.layer_graph import Edge, Layer, LayerGraph
from elbowroom.core.layer_graph_file import read_layer_graph
from elbowroom.plans.pipeline import Level, PipelineOptions
from elbowroom.plans.pipeline_shape import BUCKET_BYTES

VARIABLE = "ELBOWROOM_PIPEDREAM_PROFILES"
_BESIDE = Path(__file__).parents[4] / "shared" / "profiles" / "pipedream"
PROFILES = Path(os.environ.get(VARIABLE, _BESIDE))
NO_PROFILES = (
    f"NOT TESTED: the PipeDream authors' profiles are not in {PROFILES}; set {VARIABLE} to a folder"
    " of the *.graph.txt files of their public repository, msr-fiddle/pipedream"
)
TEN_GBIT = 1.25e9


def profile(name: str) -> LayerGraph:
    """One of the authors' profiles; the test is skipped where their files are not."""
    path = PROFILES / f"{name}.graph.txt"
    if not path.exists():
        pytest.skip(NO_PROFILES)
    return read_layer_graph(path)


def chain(layers: Sequence[tuple[float, int, int]]) -> LayerGraph:
    """Layers after each other, of (seconds, activation bytes, parameter bytes)."""
    edges = [(index, index + 1) for index in range(len(layers) - 1)]
    return graph(layers, edges)


def graph(layers: Sequence[tuple[float, int, int]], edges: Sequence[tuple[int, int]]) -> LayerGraph:
    """A third of a layer's seconds are forward."""
    return LayerGraph(
        tuple(
            Layer(f"n{index}", seconds / 3, seconds * 2 / 3, activation_bytes, parameter_bytes)
            for index, (seconds, activation_bytes, parameter_bytes) in enumerate(layers)
        ),
        tuple(Edge(f"n{source}", f"n{destination}") for source, destination in edges),
    )


def downsets(graph: LayerGraph) -> list[frozenset[int]]:
    """Every set of layers that holds what its layers read, by size, then by earliest layers."""
    found = {frozenset[int]()}
    for index in graph.order:
        found |= {cut | {index} for cut in found if cut.issuperset(graph.sources[index])}
    place = {layer: position for position, layer in enumerate(graph.order)}
    return sorted(found, key=lambda cut: (len(cut), sum(2 ** place[layer] for layer in cut)))


def crossing_bytes(graph: LayerGraph, before: frozenset[int]) -> int:
    return sum(graph.layers[index].activation_bytes for index in _crossing(graph, before))


def returned_bytes(graph: LayerGraph, before: frozenset[int]) -> int:
    return sum(graph.layers[index].returned_bytes for index in _crossing(graph, before))


def _crossing(graph: LayerGraph, before: frozenset[int]) -> Iterator[int]:
    for index in before:
        if any(reader not in before for reader in graph.readers[index]):
            yield index


class NaiveMemory(NamedTuple):
    each: int
    """By minibatch in flight."""

    once: int
    swappable: int
    """Part of ``each`` that can be away, of all but two."""


def naive_memory(
    graph: LayerGraph,
    cuts: Sequence[frozenset[int]],
    start: frozenset[int],
    stop: frozenset[int],
    is_replicated: bool,
    options: PipelineOptions,
) -> NaiveMemory:
    """Memory of a stage between two cuts: at every moment of every order of its layers."""
    layers, inside, optimizer = graph.layers, stop - start, options.optimizer
    weights = sum(layers[index].parameter_bytes for index in inside)
    received = crossing_bytes(graph, start)
    if optimizer is None:
        outputs = sum(layers[index].activation_bytes for index in inside)
        return NaiveMemory(weights + received + outputs, 0, outputs)
    loose = sum(layers[index].memory_or_output.loose_bytes for index in _crossing(graph, stop))
    swappable = sum(layers[index].memory_or_output.kept_bytes for index in inside)
    kept = swappable + loose
    moments = []
    for done in cuts:
        if start < done <= stop:
            live = sum(layers[index].memory_or_output.kept_bytes for index in done - start)
            gradients = sum(layers[index].parameter_bytes for index in stop - done)
            for last in (index for index in done - start if done - {index} in cuts):
                needs = layers[last].memory_or_output
                moments.append(live + needs.forward_bytes)
                moments.append(live + gradients + needs.backward_bytes + loose)
    largest = max(layers[index].memory_or_output.largest_parameter_bytes for index in inside)
    step = 2 * largest if optimizer == "adamw" else 0
    moments.append(max(weights, step) if is_replicated else weights + step)
    state = {"sgd": 0, "momentum": weights, "adamw": 2 * weights}[optimizer]
    if is_replicated:
        state += weights + min(weights, max(BUCKET_BYTES, largest))
    messages = options.depth * (received + returned_bytes(graph, start))
    messages += (options.depth + 1) * returned_bytes(graph, stop)
    once = state + max(moments) - kept + messages
    return NaiveMemory(weights + received + kept, once, swappable)


class NaiveStage(NamedTuple):
    layers: frozenset[str]
    replicas: int
    in_flight: int
    memory_bytes: int
    swapped_bytes: int


class NaivePlan(NamedTuple):
    seconds: float
    num_bytes: int
    """Over the links of the outermost level."""

    stages: tuple[NaiveStage, ...]


def naive_plan(
    graph: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions
) -> NaivePlan | None:
    """The best of all plans, ties broken as documented; None if none fits."""
    naive = _Naive(graph, levels, options)
    most = levels[-1].num_units
    counts = tuple(range(1, most + 1)) if options.fewer_workers else (most,)
    return naive.best(len(levels) - 1, 1, 0, 0, len(naive.cuts) - 1, counts)


class _Naive:
    """Tries all plans of a graph, level by level."""

    def __init__(
        self, graph: LayerGraph, levels: tuple[Level, ...], options: PipelineOptions
    ) -> None:
        self.graph = graph
        self.levels = levels
        self.options = options
        self.cuts = cuts = downsets(graph)
        groups = [{graph.index[name] for name in names} for names in graph.tied]
        self.apart = {
            k for k, cut in enumerate(cuts) if any(0 < len(cut & g) < len(g) for g in groups)
        }
        self.factor = 4 if options.sync == "ps" else 2
        self.best = cache(self._best)

    def _best(
        self, level: int, copies: int, behind: int, start: int, stop: int, counts: tuple[int, ...]
    ) -> NaivePlan | None:
        ways = []
        for path in _paths(self.cuts, start, stop, max(counts)):
            if not self.apart.isdisjoint(path):
                continue
            for count in counts:
                for units in _shares(count, len(path) - 1, self.options.straight):
                    way = self._measure(level, copies, behind, path, units)
                    if way is not None:
                        ways.append((way, count, _key(path, units)))
        if not ways:
            return None
        limit = min(way.seconds for way, _, _ in ways) * (1 + 1e-9)
        equal = [way for way in ways if way[0].seconds <= limit]
        return min(equal, key=lambda way: (way[0].num_bytes, way[1], way[2]))[0]

    def _measure(
        self, level: int, copies: int, behind: int, path: Sequence[int], units: Sequence[int]
    ) -> NaivePlan | None:
        graph, cuts, factor = self.graph, self.cuts, self.factor
        bandwidth = self.levels[level].bandwidth
        unit_workers = prod(below.num_units for below in self.levels[:level])
        seconds, num_bytes, stages = 0.0, 0, []
        for number, (first, last, count) in enumerate(zip(path, path[1:], units, strict=False)):
            inside = cuts[last] - cuts[first]
            weights = sum(graph.layers[index].parameter_bytes for index in inside)
            workers_behind = behind + copies * sum(units[number + 1 :]) * unit_workers
            unit = self._of_unit(level, copies * count, workers_behind, first, last)
            if unit is None:
                return None
            sync = factor * (count - 1) / count * weights / bandwidth
            overlaps = self.options.overlap == "max"
            own = max(unit.seconds, sync) if overlaps else unit.seconds + sync
            seconds = max(seconds, own / count)
            num_bytes += factor * (count - 1) * weights // count
            stages += unit.stages
            if number < len(units) - 1:
                moved = crossing_bytes(graph, cuts[last]) + returned_bytes(graph, cuts[last])
                seconds = max(seconds, moved / bandwidth)
                num_bytes += moved
        return NaivePlan(seconds, num_bytes, tuple(stages))

    def _of_unit(
        self, level: int, replicas: int, behind: int, first: int, last: int
    ) -> NaivePlan | None:
        graph, levels, cuts, options = self.graph, self.levels, self.cuts, self.options
        if level > 0:
            counts = (levels[level - 1].num_units,)
            return self.best(level - 1, replicas, behind, first, last, counts)
        inside = cuts[last] - cuts[first]
        # One of its own, and for the workers behind, shared by its replicas, rounded up.
        in_flight = 1 + options.depth * ((behind + replicas - 1) // replicas)
        is_replicated = replicas > 1 or len(levels) > 1
        each, once, swappable = naive_memory(
            graph, cuts, cuts[first], cuts[last], is_replicated, options
        )
        held, swapped = in_flight * each + once, 0
        if options.semantics == "predict" and in_flight > 1:
            held += sum(graph.layers[index].parameter_bytes for index in inside)
        limit, swap_bandwidth = options.memory_limit_bytes, options.swap_bandwidth
        seconds = sum(graph.layers[index].seconds for index in inside)
        if limit is not None and held > limit and swap_bandwidth is not None and in_flight >= 3:
            swapped = swappable
            held -= (in_flight - 2) * swapped
            seconds = max(seconds, (swapped + swapped) / swap_bandwidth)
        if limit is not None and held > limit:
            return None
        names = frozenset(graph.layers[index].name for index in inside)
        return NaivePlan(seconds, 0, (NaiveStage(names, replicas, in_flight, held, swapped),))


def _paths(
    cuts: Sequence[frozenset[int]], start: int, stop: int, most: int
) -> Iterator[tuple[int, ...]]:
    """Cuts from one to another of which each holds the one before, with at most so many steps."""
    if most == 0:
        return
    if cuts[start] < cuts[stop]:
        yield start, stop
    for between in range(start + 1, stop):
        if cuts[start] < cuts[between] < cuts[stop]:
            for path in _paths(cuts, between, stop, most - 1):
                yield start, *path


def _shares(count: int, num_groups: int, straight: bool) -> Iterator[tuple[int, ...]]:
    """All ways to give each group some of ``count`` units, and all of them away."""
    for bounds in combinations(range(1, count), num_groups - 1):
        ends = (0, *bounds, count)
        shares = tuple(high - low for low, high in pairwise(ends))
        if not straight or set(shares) == {1}:
            yield shares


def _key(path: Sequence[int], units: Sequence[int]) -> list[tuple[int, int]]:
    return [(cut, -count) for cut, count in zip(path[1:], units, strict=True)]


def flat(num_workers: int, bandwidth: float = TEN_GBIT) -> tuple[Level, ...]:
    return (Level(num_workers, bandwidth),)
