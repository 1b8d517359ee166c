"""Pipeline plans: which layers each stage trains, on how many workers, and what that costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from elbowroom.core.errors import InputError
from elbowroom.core.files import is_of_format, unversioned, versioned
from elbowroom.core.units import format_bandwidth

Sync = Literal["ps", "allreduce"]
Overlap = Literal["max", "sum"]

Optimizer = Literal["sgd", "momentum", "adamw"]

Semantics = Literal["stash", "predict", "vertical-sync", "flush", "naive"]
"""Which version of the weights a minibatch uses at a stage.

``stash``: forward and backward use the version that was newest at the forward. ``predict``: that
version extrapolated by the last update, ``HORIZON`` times for each update still missing
(``pipeline.versions``). ``vertical-sync``: the version that was newest at the first stage.
``flush``: no update happens while a minibatch is in flight. ``naive``: each pass uses the newest.
"""

PlannedSemantics = Literal["stash", "predict"]
"""The semantics that a plan can name, as their memory is counted."""

SYNCS: tuple[Sync, ...] = get_args(Sync)
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SEMANTICS: tuple[Semantics, ...] = get_args(Semantics)
PLANNED_SEMANTICS: tuple[PlannedSemantics, ...] = get_args(PlannedSemantics)
RESIDENT = 2
"""Minibatches of a swapping stage whose saved tensors are on the worker: the one that computes, and
one that leaves or comes."""

_WHAT, _VERSION = "pipeline plan", 1


@dataclass(frozen=True)
class Level:
    """One level of a topology: ``num_units`` units of the level below, or workers at the lowest.

    Each unit reaches the others with ``bandwidth`` bytes/s. Raises InputError for a level that
    joins nothing or carries nothing.
    """

    num_units: int
    bandwidth: float
    name: str = "link"

    def __post_init__(self) -> None:
        if self.num_units < 1 or not 0 < self.bandwidth < float("inf"):
            raise InputError(
                f"a level of {self.num_units} units at {self.bandwidth} bytes/s: give at least one "
                "unit, and a bandwidth above 0"
            )

    def __str__(self) -> str:
        return f"{self.num_units} x {format_bandwidth(self.bandwidth)}"


@dataclass(frozen=True)
class PipelineOptions:
    """Options that a plan is made for.

    Args:
        sync: how replicas synchronise weights. On m workers ``ps`` moves 4(m-1)/m times the weights
            (a parameter server, both ways: the authors' code and arXiv 1806.03377), ``allreduce``
            2(m-1)/m (SOSP 2019).
        overlap: whether synchronisation hides behind compute (``max``) or is added to it (``sum``).
        memory_limit_bytes: limit for one worker; None is no limit.
        straight: replicate no stage.
        fewer_workers: allow idle units of the outermost level.
        depth: warm-up forwards, as a multiple of the papers' (``planning.pipeline.schedule``).
        optimizer: optimizer whose state counts in a worker's memory, and with it gradients,
            temporary memory of passes, and message buffers. None counts what the papers count:
            weight versions and what minibatches in flight keep.
        semantics: weight semantics that a run uses unless told otherwise. ``predict`` takes one
            weight version more on stages with more than one minibatch in flight.
        swap_bandwidth: bytes/s between a worker and where it swaps, out and in after each other.
            Stages that exceed the memory limit may then swap what minibatches in flight have saved
            (``StagePlan.swapped_bytes``). None: no stage swaps.

    Raises InputError for values that are none of these.

    """

    sync: Sync = "ps"
    overlap: Overlap = "max"
    memory_limit_bytes: int | None = None
    straight: bool = False
    fewer_workers: bool = False
    depth: int = 1
    optimizer: Optimizer | None = None
    semantics: PlannedSemantics = "stash"
    swap_bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("sync", self.sync, SYNCS),
            ("overlap", self.overlap, OVERLAPS),
            ("optimizer", self.optimizer, (None, *OPTIMIZERS)),
            ("semantics", self.semantics, PLANNED_SEMANTICS),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is not one of {', '.join(map(str, known))}")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise InputError(f"a worker of {self.memory_limit_bytes} bytes holds nothing")
        if self.depth < 1:
            raise InputError(f"a pipe of depth {self.depth} never runs: give at least 1")
        if self.swap_bandwidth is not None and not 0 < self.swap_bandwidth < float("inf"):
            raise InputError(f"swapping at {self.swap_bandwidth} bytes/s: give a bandwidth above 0")

    @property
    def sync_factor(self) -> int:
        """Factor c: each of m replicas moves c (m-1)/m times the weights to synchronise."""
        return 4 if self.sync == "ps" else 2


@dataclass(frozen=True)
class StagePlan:
    """One stage: layers that are trained together, and what they cost.

    Seconds and bytes are per minibatch of the whole pipeline: with r replicas, each takes every
    r-th.

    Args:
        layers: names, each after those it reads.
        level_replicas: replicas at each level, the outermost first; ``replicas`` is their product.
        seconds: compute and weight synchronisation: the larger of the two, or their sum.
        transfer_seconds: forward and backward over the cut behind this stage; 0 for the last.
        in_flight: minibatches between their forward and backward; also the number of weight
            versions.
        warmup_forwards: forwards before the first backward.
        memory_bytes: of one worker: ``in_flight`` times (its weights + what a minibatch keeps),
            less ``spared_bytes``, plus ``fixed_bytes``.
        parameter_bytes: weights of the stage.
        sync_bytes: moved to synchronise the replicas.
        transfer_bytes: moved over the cut behind this stage, forward and backward.
        fixed_bytes: memory that does not scale with ``in_flight``
            (``planning.pipeline.stage_cost``).
        returned_bytes: the gradients among ``transfer_bytes`` (None: half of them).
        swapped_bytes: of each minibatch, bytes that leave the worker after its forward and come
            back for its backward; 0 for a stage that does not swap. Those of two minibatches at
            most are on the worker at any time: of the one that computes, and of one that leaves.

    Raises InputError for more swapped bytes than a minibatch keeps, and for swapping with so few
    minibatches in flight that none would ever be away.

    """

    layers: tuple[str, ...]
    level_replicas: tuple[int, ...]
    replicas: int
    seconds: float
    transfer_seconds: float
    in_flight: int
    warmup_forwards: int
    memory_bytes: int
    parameter_bytes: int
    sync_bytes: int
    transfer_bytes: int
    fixed_bytes: int = 0
    returned_bytes: int | None = None
    swapped_bytes: int = 0

    def __post_init__(self) -> None:
        if self.swapped_bytes and self.in_flight <= RESIDENT:
            raise InputError(
                f"a stage with {self.in_flight} minibatches in flight swaps nothing: "
                f"{RESIDENT} stay on the worker"
            )
        if self.swapped_bytes and not 0 < self.swapped_bytes <= self.kept_bytes:
            raise InputError(
                f"{self.swapped_bytes} swapped bytes of a minibatch that keeps {self.kept_bytes}: "
                "give at most what it keeps"
            )

    @property
    def activation_bytes(self) -> int:
        """Forward traffic over the cut behind this stage: ``transfer_bytes`` without gradients."""
        if self.returned_bytes is None:
            return self.transfer_bytes // 2
        return self.transfer_bytes - self.returned_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes that each minibatch in flight keeps, swapped ones too, weights not counted."""
        scaled = self.memory_bytes + self.spared_bytes - self.fixed_bytes
        return scaled // self.in_flight - self.parameter_bytes

    @property
    def spared_bytes(self) -> int:
        """Memory of a worker that swapping saves: without it, the stage needs so much more."""
        return (self.in_flight - RESIDENT) * self.swapped_bytes


@dataclass(frozen=True)
class LevelTraffic:
    """Bytes per minibatch over all links of one level, compared with data-parallel training."""

    name: str
    num_bytes: int
    data_parallel_bytes: int

    @property
    def saved(self) -> float:
        """Fraction of data parallelism's bytes that the pipeline does not move."""
        if not self.data_parallel_bytes:
            return 0.0
        return 1 - self.num_bytes / self.data_parallel_bytes


@dataclass(frozen=True)
class DataParallel:
    """The alternative of all layers on all workers: time per minibatch, memory of one worker."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class PipelinePlan:
    """Stages from the input to the loss, and the facts and options they were chosen for.

    ``levels`` is the topology, the lowest level first; ``traffic`` has one entry for each.
    ``seconds`` per minibatch are those of the slowest stage or transfer. ``is_exact`` is False when
    only some of the possible cuts were searched (``planning.pipeline.cuts``); ``num_cuts`` is how
    many were. ``simulated_seconds`` per minibatch are those of a full pipe, if it was simulated.
    """

    stages: tuple[StagePlan, ...]
    levels: tuple[Level, ...]
    options: PipelineOptions
    seconds: float
    traffic: tuple[LevelTraffic, ...]
    data_parallel: DataParallel
    num_cuts: int
    is_exact: bool
    simulated_seconds: float | None = None

    @property
    def replicas(self) -> tuple[int, ...]:
        """Number of workers of each stage."""
        return tuple(stage.replicas for stage in self.stages)

    @property
    def num_workers(self) -> int:
        """Number of workers that do work: fewer than the topology's where some may stay idle."""
        return sum(self.replicas)

    @property
    def noam(self) -> int:
        """Minibatches that keep the pipe full: ceil(workers / replicas of the input stage).

        PipeDream's NUM_OPT_ACTIVE_MINIBATCHES. At depth 1, the number that each worker of the input
        stage has in flight.
        """
        return -(-self.num_workers // self.stages[0].replicas)

    @property
    def speedup(self) -> float:
        """Speedup over data-parallel training on all workers."""
        return self.data_parallel.seconds / self.seconds if self.seconds else 1.0

    def __str__(self) -> str:
        return "-".join(str(stage.replicas) for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {**versioned(_WHAT, _VERSION), **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> PipelinePlan:
        """Build a plan from its JSON form. Raises InputError for what ``to_json`` never writes."""
        rest = unversioned(data, _WHAT, _VERSION)
        try:
            plan = PipelinePlan(
                **{
                    **rest,
                    "stages": tuple(_stage(stage) for stage in data["stages"]),
                    "levels": tuple(Level(**level) for level in data["levels"]),
                    "options": PipelineOptions(**data["options"]),
                    "traffic": tuple(LevelTraffic(**level) for level in data["traffic"]),
                    "data_parallel": DataParallel(**data["data_parallel"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"no pipeline plan: {error}") from error
        if not plan.stages:
            raise InputError("a pipeline plan needs at least one stage")
        return plan


def is_pipeline_plan(path: Path) -> bool:
    """Whether a file says that it is a pipeline plan. Raises InputError if it cannot be read."""
    return is_of_format(path, _WHAT)


def read_pipeline_plan(path: str | Path) -> PipelinePlan:
    """Read a plan from a JSON file.

    Raises InputError for a file that cannot be read, or that holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {path}: {error}") from error
    return PipelinePlan.from_json(data)


def _stage(data: dict[str, Any]) -> StagePlan:
    lists = {key: tuple(data[key]) for key in ("layers", "level_replicas")}
    return StagePlan(**{**data, **lists})
