"""What stages between cuts need of memory, beside weights, when layers were measured.

While a stage works on one minibatch, live are what its layers up to the one that runs keep, in the
backward also gradients of the weights of those behind it, and what that layer's own pass takes
(``core.layer_graph.LayerMemory``). The most of it depends on the order in which branches run: it is
taken over every order. Along a chain there is one.

The most from cut i to cut j is the larger of that from i to a cut right before j, over all of
these, and what the layers between those two take. So all pairs take as many steps as there are
pairs of neighbours, each on a row of cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.layer_graph import LayerMemory

Integers = NDArray[np.int64]

_NOTHING = -(2**62)


class SegmentMemory(NamedTuple):
    """Of one thing that the planner moves."""

    memory: LayerMemory
    parameter_bytes: int


@dataclass(frozen=True, eq=False)
class CutMemory:
    """Bytes by cut, and by the cuts where a stage begins and ends.

    Args:
        kept_bytes: int64 [num_cuts]; a minibatch keeps so much of what lies before a cut.
        loose_bytes: int64 [num_cuts]; of what crosses, so much is kept for that reason alone.
        forward_bytes: int64 [num_cuts, num_cuts]; the most that one minibatch takes in the forward
            of a stage, beside what is kept of layers before the stage.
        backward_bytes: the same of the backward, without gradients of all weights before its end.
        largest_bytes: of the stage's weights, the largest.

    """

    kept_bytes: Integers
    loose_bytes: Integers
    forward_bytes: Integers
    backward_bytes: Integers
    largest_bytes: Integers

    def only(self, indices: Integers) -> CutMemory:
        """Of some of the cuts."""
        pairs = np.ix_(indices, indices)
        return replace(
            self,
            kept_bytes=self.kept_bytes[indices],
            loose_bytes=self.loose_bytes[indices],
            forward_bytes=self.forward_bytes[pairs],
            backward_bytes=self.backward_bytes[pairs],
            largest_bytes=self.largest_bytes[pairs],
        )


def find_cut_memory(
    segments: Sequence[SegmentMemory],
    inside: Integers,
    holds: NDArray[np.bool_],
    loose_bytes: Integers,
    input_bytes: int,
) -> CutMemory:
    """Of cuts, smaller ones first: ``inside`` is [num_cuts, num_segments], 1 for what lies before.

    ``holds`` is as ``planning.cuts`` has it. Minibatches in a first stage keep ``input_bytes``.
    """
    size = len(inside)
    weights = inside @ np.array([segment.parameter_bytes for segment in segments], np.int64)
    kept = inside @ np.array([segment.memory.kept_bytes for segment in segments], np.int64)
    kept[1:] += input_bytes
    most = np.full((size, 3, size), _NOTHING, np.int64)  # by last cut, then by first
    for before, cut in zip(*np.nonzero(_neighbours(holds).T)[::-1], strict=True):
        between = [segments[p] for p in np.flatnonzero(inside[cut] - inside[before])]
        step = _step(between, int(kept[before]) or input_bytes, int(weights[before]))
        begins = holds[:, before].copy()
        begins[before] = True
        reached = np.where(begins, np.maximum(most[before], step[:, None]), _NOTHING)
        np.maximum(most[cut], reached, out=most[cut])
    forward, backward, largest = most.transpose(1, 2, 0).copy()
    return CutMemory(kept, loose_bytes, forward, backward, largest)


def _step(segments: Sequence[SegmentMemory], kept_bytes: int, parameter_bytes: int) -> Integers:
    """[3]: the most of segments after each other, with so much before them."""
    forward = backward = largest = _NOTHING
    for memory, own_bytes in segments:
        kept_bytes += memory.kept_bytes
        parameter_bytes += own_bytes
        forward = max(forward, kept_bytes + memory.forward_bytes)
        backward = max(backward, kept_bytes - parameter_bytes + memory.backward_bytes)
        largest = max(largest, memory.largest_parameter_bytes)
    return np.array([forward, backward, largest], np.int64)


def _neighbours(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[i, j]: cut j holds cut i, and no cut lies between."""
    counts = holds.astype(np.float32)  # below 2^24: exact
    direct: NDArray[np.bool_] = holds & (counts @ counts == 0)
    return direct
