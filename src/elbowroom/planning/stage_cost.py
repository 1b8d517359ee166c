"""What a stage of a pipeline takes, moves and keeps: the terms that plans are compared by.

Papers: arXiv 1806.03377 section 3.2, SOSP 2019 section 3.1. A stage of layers i..j on m units
takes, per minibatch,

    T(i..j, m) = max( U(i..j), c (m-1)/m w(i..j) / B ) / m        or the sum of the two,

U being the seconds of one unit: forward and backward of all layers on one worker at the lowest
level, and the best pipeline on all units of the level below at the others. Between two stages
2 a / B passes, activations one way and gradients back, undivided however often the stages are
replicated. B is the bandwidth of the level; latencies are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from elbowroom.core.pipeline_plan import Level, PipelineOptions
from elbowroom.planning.cuts import Cuts, Floats, Integers


class Place(NamedTuple):
    """Where a component stands: so many copies of it, and so many workers behind all of them."""

    copies: int
    workers_behind: int


WHOLE = Place(1, 0)


def in_flight(place: Place) -> int:
    """Minibatches that a worker keeps, if ``place`` is that of a stage and all its replicas."""
    return 1 + -(-place.workers_behind // place.copies)


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

    def unit_place(self, level: int, place: Place, num_units: int, units_behind: int) -> Place:
        """Of each unit of a group that has ``units_behind`` units behind it in its component."""
        unit_workers = prod(below.num_units for below in self.levels[:level])
        behind = place.workers_behind + place.copies * units_behind * unit_workers
        return Place(place.copies * num_units, behind)
