"""What a grid is planned for: workers, batch, link, rate, a limit of memory, allowed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from elbowroom.core.errors import InputError, shown
from elbowroom.core.values import check_whole

Forms = Literal["paper", "linear", "all"]
"""Which roles layers may split.

``paper``: convolutions batch or one dimension of space, linear layers one 1.5D grid for all.
``linear``: convolutions batch and space, linear layers batch, outputs and inputs.
``all``: every layer batch, space, outputs and inputs.
"""

MAX_PROCS = 1 << 14


@dataclass(frozen=True)
class GridLink:
    """A link between any two workers: seconds of a message, and bytes a second that it adds."""

    latency_seconds: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_seconds < float("inf"):
            raise InputError(f"the latency is {self.latency_seconds} s: give 0 or more")
        if not self.bandwidth > 0:
            raise InputError(f"the bandwidth is {self.bandwidth} bytes/s: give more than 0")


KNL = GridLink(2e-6, 6e9)
"""The paper's: Cori's KNL nodes, 2 us and 6 GB/s (1712.04432, experiments)."""


@dataclass(frozen=True)
class GridSettings:
    """What a grid is planned for.

    Args:
        procs: workers.
        batch: samples of a minibatch, of all workers together.
        link: between any two workers.
        forms: which roles layers may split.
        flops_per_second: of one worker, for layers whose seconds were not measured; None: only
            measured seconds count, and layers without are free.
        memory_bytes: of one worker, for weights, gradients, momentum and activations; None: any.
        overlap: whether sums of weights' gradients run behind the backward.

    Raises InputError for numbers that make no sense.

    """

    procs: int
    batch: int
    link: GridLink
    forms: Forms = "all"
    flops_per_second: float | None = None
    memory_bytes: int | None = None
    overlap: bool = True

    def __post_init__(self) -> None:
        check_whole("procs", self.procs, MAX_PROCS, least=1)
        check_whole("batch", self.batch, 10**12, least=1)
        if self.forms not in get_args(Forms):
            raise InputError(f"forms is {shown(self.forms)}: give {', '.join(get_args(Forms))}")
        if self.flops_per_second is not None and not self.flops_per_second > 0:
            raise InputError(f"flops_per_second is {self.flops_per_second}: give more than 0")
        if self.memory_bytes is not None:
            check_whole("memory_bytes", self.memory_bytes, 10**18, least=1)
