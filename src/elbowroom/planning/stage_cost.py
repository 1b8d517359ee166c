"""What a stage of a pipeline takes, moves and keeps: the terms that plans are compared by.

Papers: arXiv 1806.03377 section 3.2, SOSP 2019 section 3.1. A stage of layers i..j on m units
takes, per minibatch,

    T(i..j, m) = max( U(i..j), c (m-1)/m w(i..j) / B ) / m        or the sum of the two,

U being the seconds of one unit: forward and backward of all layers on one worker at the lowest
level, and the best pipeline on all units of the level below at the others. Between two stages
2 a / B passes, activations one way and gradients back, undivided however often the stages are
replicated. B is the bandwidth of the level; latencies are left out. (The authors' results would
come out as well if a transfer were shared out among the replicas that receive it, but not among
those that send it; undivided is what the papers write.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np

from elbowroom.core.pipeline_plan import Level, PipelineOptions
from elbowroom.planning.cuts import Cuts, Floats, Integers

Counts = TypeVar("Counts", int, Integers)


@dataclass(frozen=True, eq=False)
class StageCost:
    """Of stages between cuts, on levels of which the lowest is first."""

    cuts: Cuts
    levels: tuple[Level, ...]
    options: PipelineOptions

    def transfer_seconds(self, level: int) -> Floats:
        """[num_cuts]: activations over each cut, and gradients back."""
        return 2 * self.cuts.crossing_bytes.astype(np.float64) / self.levels[level].bandwidth

    def sync_bytes(self, num_units: int, parameter_bytes: Integers) -> Integers:
        """Moved per minibatch so that units agree on so many bytes of weights, rounded down."""
        moved: Integers = self.options.sync_factor * (num_units - 1) * parameter_bytes // num_units
        return moved

    def replicated(
        self, level: int, unit_seconds: Floats, num_units: int, parameter_bytes: Integers
    ) -> Floats:
        """T(i..j, m): seconds per minibatch on ``num_units`` units that agree on weights."""
        factor = self.options.sync_factor * (num_units - 1) / num_units
        sync = factor * parameter_bytes / self.levels[level].bandwidth
        joined = unit_seconds + sync
        if self.options.overlap == "max":
            joined = np.maximum(unit_seconds, sync)
        shared: Floats = joined / num_units
        return shared

    def memory_bytes(self, start: int, stops: slice | int) -> Integers:
        """Of one minibatch in flight: weights, outputs, and what is received over the cut."""
        cuts = self.cuts
        held: Integers = (
            (cuts.parameter_bytes[stops] - cuts.parameter_bytes[start])
            + (cuts.output_bytes[stops] - cuts.output_bytes[start])
            + cuts.crossing_bytes[start]
        )
        return held

    def in_flight(self, unit_behind: Counts) -> Counts:
        """Minibatches that a worker keeps, with so many behind it: see ``Pipe.warmup_forwards``."""
        return 1 + self.options.depth * unit_behind

    def unit_behind(self, level: int, behind: int, num_units: int, units_behind: int) -> int:
        """Workers behind each unit of a group that has ``units_behind`` units behind it.

        ``behind`` are those behind the group's component. Both are shared out among the copies that
        take turns with minibatches, and rounded up: a worker of a stage keeps ``depth`` minibatches
        in flight for each that is then behind it, and one of its own. To round up at each level
        is to round up once: ceil((x + n) / m) is ceil((ceil(x) + n) / m) for whole n and m.
        """
        unit_workers = prod(below.num_units for below in self.levels[:level])
        return -(-(behind + units_behind * unit_workers) // num_units)
