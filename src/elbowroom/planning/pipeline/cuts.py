"""Possible cuts of a graph of layers into stages.

A cut is the set of layers before it; with each layer, the set holds all that the layer reads.
(PipeDream's authors describe it by an antichain: the set is the antichain and its predecessors.) A
stage is what lies between one cut and a later cut that holds it. A chain of n layers has n + 1
cuts; branches multiply.

- Each output that some layer behind a cut reads crosses the cut once, however many layers read it
  there. A tensor that skips stages crosses every cut on its way, passed on from stage to stage.
- No cut lies between layers that share weights.
- Inputs (sources described as "Input..."), and layers that cost nothing and read nothing but
  inputs, lie in the first stage. They take no time and cross no cut: loading overlaps with
  training, and each stage can load what it reads. The authors do not give the planner a choice here
  either.
- A free layer that reads one layer and is read by none (an unused element of a tuple, a view of the
  result) goes with the layer that it reads, and its output is not kept.

The last two rules keep such layers from multiplying the cuts. They change neither time nor bytes of
the best plan: a stage of nothing but free layers is an idle worker, which has an option of its own.

If there are more than ``max_cuts`` cuts, only some are searched, in bounded time. Layers are added
one by one, and for each number of layers only the cuts with the cheapest crossings are kept, at
least one; in a graph with more layers than ``max_cuts``, only the cheapest cut of each window. A
plan made of these cuts is a valid plan of the graph with exact numbers, and the best of all that
can be made of them. A better one may need a cut that was left out: then ``is_exact`` is False.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.layer_graph import LayerGraph
from elbowroom.planning.pipeline.cut_memory import CutMemory, SegmentMemory, find_cut_memory
from elbowroom.planning.pipeline.segments import Segments, find_segments

_MOST_CANDIDATES = 32
"""Segments tried as the next one to add, where not all cuts are searched."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cuts:
    """Cuts ordered by the number of segments before them, then by the earliest layers.

    The last cut holds all layers. Arrays [num_cuts] describe what lies before each cut: ``seconds``
    of forward, backward and update, ``parameter_bytes``, and ``output_bytes``, which a minibatch in
    flight keeps. ``crossing_bytes`` of activations cross the cut, and ``returned_bytes`` of
    gradients come back. ``holds`` is bool [num_cuts, num_cuts]: [i, j] says that cut j holds cut i
    and more, so that a stage may lie between. ``input_bytes`` of the model's inputs count as kept
    before every cut but the first. ``memory`` is None unless it was asked for.
    """

    graph: LayerGraph
    segments: Segments
    masks: tuple[int, ...]
    seconds: Floats
    parameter_bytes: Integers
    output_bytes: Integers
    crossing_bytes: Integers
    returned_bytes: Integers
    holds: NDArray[np.bool_]
    is_exact: bool
    input_bytes: int
    memory: CutMemory | None = None

    @property
    def num_cuts(self) -> int:
        return len(self.masks)

    def members(self, index: int) -> frozenset[int]:
        """Indices of the layers before a cut."""
        mask = self.masks[index]
        inside = (layer for position in _bits(mask) for layer in self.segments.layers[position])
        return frozenset((*self.segments.inputs, *inside)) if mask else frozenset()

    def spread(self, most: int) -> Cuts:
        """At most ``most`` of these cuts (at least 2): cheap ones, spread along the graph."""
        return self.only(_cheapest(self.crossing_bytes, most))

    def only(self, indices: Integers) -> Cuts:
        """A subset of the cuts, order preserved; ``is_exact`` is unchanged."""
        return replace(
            self,
            masks=tuple(self.masks[index] for index in indices),
            seconds=self.seconds[indices],
            parameter_bytes=self.parameter_bytes[indices],
            output_bytes=self.output_bytes[indices],
            crossing_bytes=self.crossing_bytes[indices],
            returned_bytes=self.returned_bytes[indices],
            memory=self.memory and self.memory.only(indices),
            holds=self.holds[np.ix_(indices, indices)],
        )

    def layers_between(self, start: int, stop: int) -> tuple[str, ...]:
        """Names of the layers between two cuts, each after those that it reads."""
        inside = self.members(stop) - self.members(start)
        return tuple(self.graph.layers[i].name for i in self.graph.order if i in inside)


class _Cut(NamedTuple):
    crossing_bytes: int
    mask: int
    ready: int
    """Mask of the segments that could be added next."""

    crossing: int = 0
    """Mask of the segments whose output crosses the cut."""


class _Step(NamedTuple):
    """Extension of a cut by one segment; the first two fields order steps by cost."""

    crossing_bytes: int
    mask: int
    cut: _Cut
    position: int


def find_cuts(graph: LayerGraph, max_cuts: int, with_memory: bool = False) -> Cuts:
    """Find all cuts of a graph, or at most ``max_cuts`` (at least 2) of them.

    With ``with_memory``, also find what stages between them need of memory. Raises InputError for a
    graph in which nothing costs anything.
    """
    segments = find_segments(graph)
    cuts = _all_cuts(segments, max_cuts)
    is_exact = cuts is not None
    if cuts is None:
        width = max(1, (max_cuts - 1) // len(segments.layers))
        cuts = _some_cuts(segments, width, max_cuts)
    measured = _measure(graph, segments, cuts, is_exact, with_memory)
    if not graph.tied:
        return measured
    # Cuts between tied layers are left out only now: peak memory is over all orders of layers,
    # which do not depend on where cuts are allowed.
    kept = np.fromiter((segments.keeps_tied(mask) for mask in measured.masks), bool)
    return measured.only(np.flatnonzero(kept))


def _all_cuts(segments: Segments, max_cuts: int) -> list[_Cut] | None:
    """All cuts by size; None if there are more than ``max_cuts``."""
    found, sizes = 1, [{0: _first(segments)}]
    for _ in segments.layers:
        larger: dict[int, _Cut] = {}
        for cut in sizes[-1].values():
            for position in _bits(cut.ready):
                mask = cut.mask | 1 << position
                if mask not in larger:
                    larger[mask] = _extended(segments, cut, position)
                    if found + len(larger) > max_cuts:
                        return None
        found += len(larger)
        sizes.append(larger)
    return [cuts[mask] for cuts in sizes for mask in sorted(cuts)]


def _some_cuts(segments: Segments, width: int, max_cuts: int) -> list[_Cut]:
    """At most ``width`` cuts of each size, those that the fewest bytes cross.

    Not more than ``max_cuts`` in all.
    """
    kept, sizes = [_first(segments)], [[_first(segments)]]
    for _ in segments.layers:
        larger: dict[int, _Step] = {}
        for cut in kept:
            for position in islice(_bits(cut.ready), _MOST_CANDIDATES):
                mask = cut.mask | 1 << position
                if mask not in larger:
                    larger[mask] = _Step(
                        _crossing_with(segments, cut, position), mask, cut, position
                    )
        cheapest = heapq.nsmallest(
            width, larger.values(), key=lambda step: (not segments.keeps_tied(step.mask), step)
        )
        kept = [_extended(segments, step.cut, step.position) for step in cheapest]
        sizes.append([cut for cut in kept if segments.keeps_tied(cut.mask)])
    cuts = [cut for size in sizes for cut in sorted(size, key=lambda cut: cut.mask)]
    spread = _cheapest(np.array([cut.crossing_bytes for cut in cuts]), max_cuts)
    return [cuts[index] for index in spread]


def _cheapest(crossing_bytes: Integers, most: int) -> Integers:
    """Indices of at most ``most`` cuts: both ends, and the cheapest of each of equal windows."""
    size = len(crossing_bytes)
    if size <= most:
        return np.arange(size)
    bounds = np.linspace(1, size - 1, most - 1).astype(int)
    starts, ends = bounds[:-1], bounds[1:]
    pairs = zip(starts[starts < ends], ends[starts < ends], strict=True)
    inner = [low + int(crossing_bytes[low:high].argmin()) for low, high in pairs]
    return np.array([0, *inner, size - 1])


def _first(segments: Segments) -> _Cut:
    ready = sum(1 << position for position, sources in enumerate(segments.sources) if not sources)
    return _Cut(0, 0, ready)


def _extended(segments: Segments, cut: _Cut, position: int) -> _Cut:
    """The cut with one more segment before it."""
    mask = cut.mask | 1 << position
    readers = segments.readers[position]
    ready = cut.ready & ~(1 << position)
    for reader in _bits(readers):
        if not segments.sources[reader] & ~mask:
            ready |= 1 << reader
    crossing = cut.crossing | 1 << position if readers else cut.crossing
    for source in _bits(segments.sources[position]):
        if not segments.readers[source] & ~mask:
            crossing &= ~(1 << source)
    return _Cut(_crossing_with(segments, cut, position), mask, ready, crossing)


def _crossing_with(segments: Segments, cut: _Cut, position: int) -> int:
    """Bytes that cross the cut with one more segment before it."""
    mask = cut.mask | 1 << position
    crossing = cut.crossing_bytes
    crossing += segments.activation_bytes[position] if segments.readers[position] else 0
    for source in _bits(segments.sources[position]):
        if not segments.readers[source] & ~mask:
            crossing -= segments.activation_bytes[source]
    return crossing


def _bits(mask: int) -> Iterator[int]:
    """Positions of the one bits of ``mask``, the lowest first."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _measure(
    graph: LayerGraph, segments: Segments, cuts: list[_Cut], is_exact: bool, with_memory: bool
) -> Cuts:
    num_segments = len(segments.layers)
    width = (num_segments + 7) // 8
    rows = np.frombuffer(b"".join(cut.mask.to_bytes(width, "little") for cut in cuts), np.uint8)
    inside = np.unpackbits(rows.reshape(-1, width), axis=1, count=num_segments, bitorder="little")
    first = [graph.layers[layers[0]] for layers in segments.layers]
    activations = np.array(segments.activation_bytes, np.int64)
    crossings = [cut.crossing for cut in cuts]
    returned = [layer.returned_bytes for layer in first]
    is_open = np.array([cut.mask != 0 for cut in cuts])
    # The matrix product counts the segments of one cut that another lacks; counts below 2^24 are
    # exact in float32.
    present = inside.astype(np.float32)
    holds = (present @ (1 - present).T == 0) & ~np.eye(len(cuts), dtype=bool)
    whole, input_bytes = inside.astype(np.int64), _input_bytes(graph, segments)
    memory = None
    if with_memory:
        of_segments = [
            SegmentMemory(layer.memory_or_output, layer.parameter_bytes) for layer in first
        ]
        loose = _crossing_sums(crossings, [layer.memory_or_output.loose_bytes for layer in first])
        memory = find_cut_memory(of_segments, whole, holds, loose, input_bytes)
    return Cuts(
        graph=graph,
        segments=segments,
        masks=tuple(cut.mask for cut in cuts),
        seconds=whole @ np.array([layer.seconds for layer in first]),
        parameter_bytes=whole @ np.array([layer.parameter_bytes for layer in first], np.int64),
        output_bytes=whole @ activations + is_open * input_bytes,
        crossing_bytes=np.array([cut.crossing_bytes for cut in cuts], np.int64),
        returned_bytes=_crossing_sums(crossings, returned),
        holds=holds,
        is_exact=is_exact,
        input_bytes=input_bytes,
        memory=memory,
    )


def _crossing_sums(crossings: list[int], sizes: list[int]) -> Integers:
    """Sums of ``sizes`` over the segments whose outputs cross each cut, int64 [num_cuts]."""
    return np.array([sum(sizes[p] for p in _bits(crossing)) for crossing in crossings], np.int64)


def _input_bytes(graph: LayerGraph, segments: Segments) -> int:
    return sum(graph.layers[index].activation_bytes for index in segments.inputs)
