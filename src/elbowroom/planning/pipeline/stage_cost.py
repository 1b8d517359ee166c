"""Time, traffic and memory of a pipeline stage: the terms by which plans are compared.

Papers: arXiv 1806.03377 section 3.2, SOSP 2019 section 3.1. A stage of layers i..j on m units
takes, per minibatch,

    T(i..j, m) = max( U(i..j), c (m-1)/m w(i..j) / B ) / m        or the sum of the two,

with U the seconds of one unit: forward and backward of all layers on one worker at the lowest
level, and the best pipeline on all units of the level below at the others. Between two stages 2 a /
B passes, activations one way and gradients back, undivided however often the stages are replicated.
B is the bandwidth of the level; latencies are left out. (The authors' results would follow as well
if a transfer were shared out among the replicas that receive it, but not among those that send it;
undivided is what the papers write.)

Ours, not the papers': a worker of a stage that swaps moves what a minibatch has saved out and in
beside its compute, so that U is the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np

from elbowroom.planning.pipeline.cuts import Cuts, Floats, Integers
from elbowroom.plans.pipeline import RESIDENT, Level, Optimizer, PipelineOptions
from elbowroom.plans.pipeline_shape import BUCKET_BYTES

Counts = TypeVar("Counts", int, Integers)

_STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adamw": 2}
"""Bytes of optimizer state for each byte of weights."""

_OF_LARGEST: dict[Optimizer, int] = {"sgd": 0, "momentum": 0, "adamw": 2}
"""Temporary copies of a weight that an optimizer step makes, one weight after the other.

This is what torch.optim (2.13) does on a CPU. On CUDA it takes all weights at once (foreach), which
needs more.
"""


class WorkerMemory(NamedTuple):
    """Memory of a worker in bytes, and the bytes that each minibatch swaps to make it that."""

    num_bytes: Integers
    swapped_bytes: Integers | int


@dataclass(frozen=True, eq=False)
class StageCost:
    """Costs of stages between cuts, on levels listed from the lowest."""

    cuts: Cuts
    levels: tuple[Level, ...]
    options: PipelineOptions

    def transfer_seconds(self, level: int) -> Floats:
        """Seconds to move activations over each cut and gradients back, float [num_cuts]."""
        return self.transfer_bytes.astype(np.float64) / self.levels[level].bandwidth

    @property
    def transfer_bytes(self) -> Integers:
        """Activations over each cut and gradients back, in bytes, int64 [num_cuts].

        Integer tensors have no gradients, and count one way.
        """
        return self.cuts.crossing_bytes + self.cuts.returned_bytes

    def sync_bytes(self, num_units: int, parameter_bytes: Integers) -> Integers:
        """Bytes per minibatch to synchronise the weights of ``num_units`` units, rounded down."""
        moved: Integers = self.options.sync_factor * (num_units - 1) * parameter_bytes // num_units
        return moved

    def replicated(
        self, level: int, unit_seconds: Floats, num_units: int, parameter_bytes: Integers
    ) -> Floats:
        """T(i..j, m): seconds per minibatch on ``num_units`` units, weight sync included."""
        factor = self.options.sync_factor * (num_units - 1) / num_units
        sync = factor * parameter_bytes / self.levels[level].bandwidth
        joined = unit_seconds + sync
        if self.options.overlap == "max":
            joined = np.maximum(unit_seconds, sync)
        shared: Floats = joined / num_units
        return shared

    def minibatch_bytes(self, start: int, stops: slice | int) -> Integers:
        """Memory of each minibatch in flight: a version of the weights, and what it keeps."""
        return self._weights(start, stops) + self._kept(start, stops)

    def fixed_bytes(
        self, start: int, stops: slice | int, in_flight: Integers | int, num_units: int
    ) -> Integers:
        """Peak memory of a worker that does not scale with minibatches in flight.

        The sum of these, in bytes:

        - the newest weights, where more than one minibatch is in flight and they use predicted
          ones;
        - optimizer state;
        - the peak of the current minibatch's pass, or of the update after it, beyond what
          ``minibatch_bytes`` counts as kept by that minibatch;
        - messages: ``depth`` activations and ``depth`` gradients received ahead of time, one
          gradient being read, and ``depth`` gradients being sent;
        - in replicated stages, gradients in buckets, and one bucket to receive into.

        Without an optimizer only the first counts, as in the papers.
        """
        cuts, memory, optimizer = self.cuts, self.cuts.memory, self.options.optimizer
        weights = self._weights(start, stops)
        updated = weights * ((self.options.semantics == "predict") & np.greater(in_flight, 1))
        if memory is None or optimizer is None:
            return updated
        kept_before = memory.kept_bytes[start]
        at_end = memory.loose_bytes[stops]
        is_replicated = num_units > 1 or len(self.levels) > 1
        largest = memory.largest_bytes[start, stops]
        step = _OF_LARGEST[optimizer] * largest
        passing = memory.forward_bytes[start, stops] - kept_before
        returning = memory.backward_bytes[start, stops] + cuts.parameter_bytes[stops] - kept_before
        updating = np.maximum(weights, step) if is_replicated else weights + step
        bucket = np.minimum(weights, np.maximum(BUCKET_BYTES, largest))
        most = np.maximum(np.maximum(passing, returning + at_end), updating)
        fixed: Integers = (
            updated
            + _STATES[optimizer] * weights
            + (cuts.crossing_bytes[start] + most - self._kept(start, stops))
            + is_replicated * (weights + bucket)
            + self.options.depth * (cuts.crossing_bytes[start] + cuts.returned_bytes[start])
            + (self.options.depth + 1) * cuts.returned_bytes[stops]
        )
        return fixed

    def swappable_bytes(self, start: int, stops: slice | int) -> Integers:
        """Bytes that each minibatch can swap: what the stage's own layers keep for their backward.

        Inputs, what is received (it lies in memory of messages), outputs that are kept only because
        they cross the cut, and weights stay.
        """
        cuts, memory = self.cuts, self.cuts.memory
        kept = cuts.output_bytes if memory is None else memory.kept_bytes
        inputs = cuts.input_bytes if start == 0 else 0
        swappable: Integers = kept[stops] - kept[start] - inputs
        return swappable

    def unit_seconds(self, start: int, stops: slice | int, swapped_bytes: Integers | int) -> Floats:
        """Seconds of a minibatch on one worker: of compute, or of swapping beside it, if longer."""
        seconds: Floats = self.cuts.seconds[stops] - self.cuts.seconds[start]
        if self.options.swap_bandwidth is None:
            return seconds
        return np.maximum(seconds, 2 * swapped_bytes / self.options.swap_bandwidth)

    def memory_bytes(
        self, start: int, stops: slice | int, in_flight: Integers | int, num_units: int
    ) -> Integers:
        """Memory of a worker of a stage on ``num_units`` units with ``in_flight`` minibatches.

        Without swapping.
        """
        held: Integers = in_flight * self.minibatch_bytes(start, stops)
        return held + self.fixed_bytes(start, stops, in_flight, num_units)

    def least_bytes(
        self, start: int, stops: slice | int, in_flight: Integers | int, num_units: int
    ) -> Integers:
        """``memory_bytes``, less what swapping saves where there is a bandwidth for it."""
        held = self.memory_bytes(start, stops, in_flight, num_units)
        if self.options.swap_bandwidth is None:
            return held
        return held - self._away(in_flight) * self.swappable_bytes(start, stops)

    def worker_memory(
        self, start: int, stops: slice | int, in_flight: Integers | int, num_units: int
    ) -> WorkerMemory:
        """Memory of a worker, where a stage that would exceed the limit swaps.

        Without a bandwidth none does.
        """
        held = self.memory_bytes(start, stops, in_flight, num_units)
        limit = self.options.memory_limit_bytes
        if limit is None or self.options.swap_bandwidth is None:
            return WorkerMemory(held, 0)
        swapped = np.where(held > limit, self.swappable_bytes(start, stops), 0)
        return WorkerMemory(held - self._away(in_flight) * swapped, swapped)

    @staticmethod
    def _away(in_flight: Integers | int) -> Integers:
        """Minibatches in flight whose swapped tensors are not on the worker."""
        away: Integers = np.maximum(np.subtract(in_flight, RESIDENT), 0)
        return away

    def _weights(self, start: int, stops: slice | int) -> Integers:
        weights: Integers = self.cuts.parameter_bytes[stops] - self.cuts.parameter_bytes[start]
        return weights

    def _kept(self, start: int, stops: slice | int) -> Integers:
        """Memory that one minibatch keeps: what is received, and what layers keep.

        Without measured memory, a layer keeps its output.
        """
        cuts, memory = self.cuts, self.cuts.memory
        if memory is None:
            made: Integers = cuts.output_bytes[stops] - cuts.output_bytes[start]
        else:
            made = memory.kept_bytes[stops] - memory.kept_bytes[start] + memory.loose_bytes[stops]
        kept: Integers = made + cuts.crossing_bytes[start]
        return kept

    def in_flight(self, unit_behind: Counts) -> Counts:
        """Minibatches that a worker keeps in flight: see ``Pipe.warmup_forwards``.

        ``unit_behind`` is the number of workers behind it, shared out among its replicas.
        """
        return 1 + self.options.depth * unit_behind

    def unit_behind(self, level: int, behind: int, num_units: int, units_behind: int) -> int:
        """Workers behind each unit of a group that has ``units_behind`` units behind it.

        ``behind`` are those behind the group's component. Both are shared out among the units,
        which take turns with minibatches, and rounded up: a worker of a stage keeps ``depth``
        minibatches in flight for each worker that is then behind it, and one of its own. Rounding
        up at each level equals rounding up once: ceil((x + n) / m) is ceil((ceil(x) + n) / m) for
        whole n and m.
        """
        unit_workers = prod(below.num_units for below in self.levels[:level])
        return -(-(behind + units_behind * unit_workers) // num_units)
