"""What a rule is given to run one layer on this worker's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from elbowroom.grid.parts import Part
from elbowroom.grid.transport import Channel
from elbowroom.grid.weights import Weights
from elbowroom.plans.grid_placement import Placement
from elbowroom.training.operations.operation import Operation

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, which replicas share.

    Args:
        seed: of the run.
        step: number of the step.
        exact: draw the numbers of the whole tensor on each worker, so that they do not depend on
            the grid; else each box has numbers of its own.

    """

    seed: int = 0
    step: int = 0
    exact: bool = False

    def generator(self, *key: int) -> torch.Generator:
        """A generator for a layer by its number, and whatever else tells its numbers apart."""
        sequence = np.random.SeedSequence((self.seed, self.step, *key))
        generator = torch.Generator()
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)
        return generator


@dataclass(frozen=True, eq=False)
class Call:
    """One layer of one step.

    ``sources`` lie as the placement says; ``shape`` is the output's, with this step's batch.
    ``number`` is the layer's position in the model.
    """

    operation: Operation
    placement: Placement
    sources: tuple[Part, ...]
    shape: tuple[int, ...]
    weights: Weights
    channel: Channel
    draws: Draws
    number: int

    @property
    def source(self) -> Part:
        return self.sources[0]

    def parameter(self, role: str) -> torch.Tensor | None:
        """The part of a parameter or buffer that this worker uses; None without this role."""
        if role not in self.operation.parameters:
            return None
        return self.weights.use(self.operation.shape.name, role)

    def weight(self, role: str = "weight") -> torch.Tensor:
        """``parameter`` for one that the layer must have."""
        found = self.parameter(role)
        assert found is not None, f"'{self.operation.shape.name}' has a {role}"
        return found

    def bias(self) -> torch.Tensor | None:
        """The bias, unless it is added when sums have been taken."""
        return None if self.placement.pending else self.parameter("bias")

    def settings(self, kind: type[Kind]) -> Kind:
        assert isinstance(self.operation.settings, kind)
        return self.operation.settings

    def output(self, local: torch.Tensor) -> Part:
        """The output as computed."""
        return Part(local, self.shape, self.placement.computed, self.channel.worker)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this worker's part of the output as computed."""
        return self.placement.computed.local_shape(self.channel.worker, self.shape)
