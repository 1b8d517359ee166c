"""Memory that stages between cuts need beside weights, from measured layers.

While a stage works on one minibatch, live memory is what its layers up to the running one keep, in
the backward also weight gradients of its later layers, and the peak of the running layer's own pass
(``core.layer_graph.LayerMemory``). The peak depends on the order in which branches run; the maximum
over every order is taken. Along a chain there is one order.

The peak from cut i to cut j is the larger of the peak from i to a cut right before j, over all such
cuts, and what the segment between those two takes. All pairs together therefore need one step for
each pair of neighbouring cuts, each on a row of cuts.
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
    """Memory facts of one segment."""

    memory: LayerMemory
    parameter_bytes: int


@dataclass(frozen=True, eq=False)
class CutMemory:
    """Bytes by cut, and by the pair of cuts where a stage begins and ends.

    Args:
        kept_bytes: int64 [num_cuts]; kept by a minibatch, of all that lies before the cut.
        loose_bytes: int64 [num_cuts]; kept only because it crosses the cut.
        forward_bytes: int64 [num_cuts, num_cuts]; peak of one minibatch in the forward of a stage,
            including what layers before the stage keep.
        backward_bytes: int64 [num_cuts, num_cuts]; the same for the backward, less the gradients of
            all weights before the stage's end.
        largest_bytes: int64 [num_cuts, num_cuts]; the largest weight of the stage.

    """

    kept_bytes: Integers
    loose_bytes: Integers
    forward_bytes: Integers
    backward_bytes: Integers
    largest_bytes: Integers

    def only(self, indices: Integers) -> CutMemory:
        """The same facts for a subset of the cuts."""
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
    """Find the memory of stages between cuts, which are listed smaller ones first.

    ``inside`` is int64 [num_cuts, num_segments], 1 for segments before the cut. ``holds`` is that
    of ``planning.pipeline.cuts.Cuts``, ``loose_bytes`` that of ``CutMemory``. Minibatches in a
    first stage keep ``input_bytes``.
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
    """Peaks of consecutive segments, int64 [3]: forward, backward, largest weight.

    ``kept_bytes`` and ``parameter_bytes`` are those of all that lies before them.
    """
    forward = backward = largest = _NOTHING
    for memory, own_bytes in segments:
        kept_bytes += memory.kept_bytes
        parameter_bytes += own_bytes
        forward = max(forward, kept_bytes + memory.forward_bytes)
        backward = max(backward, kept_bytes - parameter_bytes + memory.backward_bytes)
        largest = max(largest, memory.largest_parameter_bytes)
    return np.array([forward, backward, largest], np.int64)


def _neighbours(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Direct neighbours: [i, j] is True if cut j holds cut i and no cut lies between."""
    counts = holds.astype(np.float32)  # below 2^24: exact
    direct: NDArray[np.bool_] = holds & (counts @ counts == 0)
    return direct
