"""Settings of a plan, as a user gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from elbowroom.app.machine import THIS_MACHINE
from elbowroom.core import host
from elbowroom.core.errors import InputError
from elbowroom.core.model import DTYPE_BYTES, STORAGE_BYTES
from elbowroom.core.options import option
from elbowroom.jobs.limits import RowLimits
from elbowroom.planning.pool.layouts import EngineLimits
from elbowroom.plans.pool import FETCH_ORDERS, POOL_MODES, FetchOrder, Layout, PoolMode

WHAT_IF = "what if"
"""Options of `plan` alone."""

MOST_DEVICES = 10_000
STORAGE_DTYPES = tuple(STORAGE_BYTES)
layout = partial(option, group="layout", is_planned=True)
engine = partial(option, group="engine", is_planned=True)


@dataclass(frozen=True)
class PlanSettings:
    """What is asked of a plan. None leaves a choice to the planner.

    ``memory_bytes`` is what the engine may use of one device; None is the cluster's own, and on
    this machine what is free. A replica has ``tensor_parallel`` devices, each of which pools with
    its like in other replicas.
    ``dtype`` "auto" is the model's own, and on this machine what its CPU computes fastest without
    losing digits. ``max_model_len`` None is the longest row that the model and the cache can hold.
    ``runs_here`` says that the plan is for this machine, whatever ``cluster`` its times are from.
    Raises InputError for more than ``MOST_DEVICES``.
    """

    model: Path
    cluster: str = THIS_MACHINE
    replicas: int | None = layout(None, "count", "engines with rows of their own")
    tensor_parallel: int | None = layout(None, "count", "devices of one replica")
    memory_bytes: int | None = layout(
        None, "memory", "of one device, such as 2GiB (default: what is free)", flag="--memory"
    )
    pool: PoolMode | None = layout(
        None,
        "text",
        "how a replica uses layers that others own: in place (mapped), copied ahead of use "
        "(streamed), copied, or small batches sent to the owner (shipped); none: full copies",
        choices=POOL_MODES,
    )
    slots: int | None = layout(None, "count", "buffers for streamed layers")
    fetch_order: FetchOrder = option(
        FETCH_ORDERS[0],
        "text",
        "in which streamed layers are copied",
        "layout",
        choices=FETCH_ORDERS,
    )
    dtype: str = option(
        "auto",
        "text",
        "computed in (default: the model's, or float32 where the CPU computes that faster)",
        "engine",
        choices=("auto", *DTYPE_BYTES),
    )
    max_model_len: int | None = engine(
        None, "count", "tokens of the longest row (default: what fits)"
    )
    max_num_seqs: int | None = engine(
        None, "count", "rows at once (default: as many as fit, at most 1024)"
    )
    max_num_batched_tokens: int | None = engine(
        None, "count", "tokens of one iteration (default: 2048, or fewer where memory is short)"
    )
    served_model_names: tuple[str, ...] = option(
        (),
        "names",
        "what rows may call the model, besides its folder's name",
        "engine",
        flag="--served-model-name",
        metavar="NAME",
    )
    seed: int = option(0, "number", "of sampling, for rows that give none", "engine")
    prefix_caching: bool = option(
        True,
        "switch",
        "compute shared prefixes for each row",
        "engine",
        flag="--no-prefix-caching",
    )
    vllm_options: tuple[str, ...] = ()
    weight_dtype: str | None = option(
        None, "text", "as if stored so", WHAT_IF, choices=STORAGE_DTYPES
    )
    kv_dtype: str | None = option(
        None, "text", "storage of the KV cache", WHAT_IF, choices=STORAGE_DTYPES
    )
    activation_bytes: int | None = option(
        None, "memory", "activation memory (default: derived)", WHAT_IF, flag="--activations"
    )
    calibrate: Path | None = option(None, "path", "report.json of a run", WHAT_IF, metavar="REPORT")
    limits: RowLimits = field(default_factory=RowLimits)
    runs_here: bool = False

    def __post_init__(self) -> None:
        asked = (self.replicas or 1) * (self.tensor_parallel or 1)
        if asked > MOST_DEVICES:
            raise InputError(
                f"{asked} devices are more than {MOST_DEVICES}: lower --replicas or "
                f"--tensor-parallel"
            )

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
        and (layout.is_run or not settings.is_here)
    )
