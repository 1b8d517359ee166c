"""Settings of a plan, as a user gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elbowroom.app.machine import THIS_MACHINE
from elbowroom.core import host
from elbowroom.jobs.limits import RowLimits
from elbowroom.planning.pool.layouts import EngineLimits
from elbowroom.plans.pool import FetchOrder, Layout, PoolMode


@dataclass(frozen=True)
class PlanSettings:
    """What is asked of a plan. None leaves a choice to the planner.

    ``memory_bytes`` is what the engine may use of one device; None is the cluster's own, and on
    this machine what is free. A replica has ``tensor_parallel`` devices, each of which pools with
    its like in other replicas.
    ``dtype`` "auto" is the model's own, and on this machine what its CPU computes fastest without
    losing digits. ``max_model_len`` None is the longest row that the model and the cache can hold.
    ``runs_here`` says that the plan is for this machine, whatever ``cluster`` its times are from.
    """

    model: Path
    cluster: str = THIS_MACHINE
    memory_bytes: int | None = None
    tensor_parallel: int | None = None
    replicas: int | None = None
    pool: PoolMode | None = None
    slots: int | None = None
    fetch_order: FetchOrder = "peak-shift"
    dtype: str = "auto"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    activation_bytes: int | None = None
    served_model_names: tuple[str, ...] = ()
    seed: int = 0
    prefix_caching: bool = True
    vllm_options: tuple[str, ...] = ()
    calibrate: Path | None = None
    limits: RowLimits = field(default_factory=RowLimits)
    runs_here: bool = False

    @property
    def engine(self) -> EngineLimits:
        return EngineLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.activation_bytes,
            self.max_model_len,
        )

    @property
    def is_here(self) -> bool:
        return self.runs_here or self.cluster == THIS_MACHINE

    @property
    def num_devices(self) -> int | None:
        """Into how many devices this machine is to be divided; None where nothing asks for any."""
        if self.replicas is not None or self.tensor_parallel is not None:
            return (self.replicas or 1) * (self.tensor_parallel or 1)
        return max(2, len(host.cores())) if self.pool not in (None, "none") else None


def is_asked(layout: Layout, settings: PlanSettings) -> bool:
    return (
        (settings.tensor_parallel or (1 if settings.is_here else None))
        in (None, layout.tensor_parallel)
        and settings.replicas in (None, layout.num_replicas)
        and settings.slots in (None, layout.num_slots)
        and settings.pool in (None, layout.pool)
        and not (settings.is_here and _has_several_pools(layout))
    )


def _has_several_pools(layout: Layout) -> bool:
    return layout.num_groups > 1 and layout.pool != "none"
