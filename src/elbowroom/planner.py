"""From files to plans: what ``elbowroom plan`` does, and ``run`` before it starts anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from elbowroom.core.cluster import Cluster, read_cluster
from elbowroom.core.errors import InputError, MemoryPlanError, OutputError
from elbowroom.core.model import STORAGE_BYTES, ModelFacts, read_model
from elbowroom.core.model_shapes import read_json
from elbowroom.core.plan import (
    EngineOptions,
    Layout,
    MemoryAccount,
    Prediction,
    RunPlan,
)
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload, parse_lengths
from elbowroom.jobs.lengths import FileLengths, read_lengths
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.results import write_atomically
from elbowroom.planning.cost import Batch, Term
from elbowroom.planning.memory import check_fits, longest_row
from elbowroom.planning.search import (
    Candidate,
    Choice,
    EngineLimits,
    choose,
    enumerate_layouts,
    job_seconds,
    layout_shares,
    pool_times,
    replica_limits,
    ship_threshold,
)
from elbowroom.profiling.machine import measure_machine

THIS_MACHINE = "this-machine"


@dataclass(frozen=True)
class PlanSettings:
    """What ``elbowroom plan`` is told. None leaves a choice to the planner.

    ``memory_bytes`` is what the engine may use of one device; else it is the cluster's own.
    ``lengths`` is text for ``parse_lengths``, ``input`` a batch file: one of both is given.
    """

    model: Path
    cluster: str
    input: Path | None = None
    lengths: str | None = None
    memory_bytes: int | None = None
    tensor_parallel: int | None = None
    replicas: int | None = None
    pool: str | None = None
    slots: int | None = None
    dtype: str = "auto"
    weight_dtype: str | None = None
    kv_dtype: str | None = None
    engine: EngineLimits = field(default_factory=EngineLimits)
    calibrate: Path | None = None
    limits: RowLimits = field(default_factory=RowLimits)


@dataclass(frozen=True)
class Planned:
    """Facts, and what was decided from them. ``changes`` would make an impossible job possible."""

    model: ModelFacts
    cluster: Cluster
    workload: Workload
    about_workload: str
    choice: Choice
    changes: tuple[str, ...] = ()


def plan_job(settings: PlanSettings) -> Planned:
    """Compare layouts. Raises InputError for files and names that cannot be used."""
    model = read_model(settings.model, settings.dtype)
    model = replace(
        model,
        weight_dtype=_storage(settings.weight_dtype, "--weight-dtype"),
        kv_dtype=_storage(settings.kv_dtype, "--kv-dtype"),
    )
    cluster = find_cluster(
        settings.cluster, split_cores(settings.replicas) if settings.replicas else None
    )
    if settings.memory_bytes is not None:
        cluster = cluster.with_memory(settings.memory_bytes)
    if settings.calibrate is not None:
        cluster = calibrated(cluster, settings.calibrate)
    workload, about = read_workload(
        settings.lengths, settings.input, settings.model, settings.limits
    )
    workload = workload.longest_first()

    def search(model: ModelFacts, cluster: Cluster, engine: EngineLimits) -> Choice:
        layouts = enumerate_layouts(model, cluster, settings.slots)
        asked = [layout for layout in layouts if _is_asked(layout, settings)]
        return choose(model, cluster, workload, engine, asked)

    choice = search(model, cluster, settings.engine)
    changes: tuple[str, ...] = ()
    if choice.best is None:
        changes = tuple(_smallest_changes(settings, model, cluster, workload, choice, search))
    return Planned(model, cluster, workload, about, choice, changes)


def run_plan(planned: Planned, candidate: Candidate, settings: PlanSettings) -> RunPlan:
    """The plan that carries a layout out. Raises InputError for weights that are not there."""
    if planned.model.weight_dtype is not None:
        raise InputError(
            "--weight-dtype asks what if: convert the weights, and plan with what is stored then"
        )
    layout, account = candidate.layout, candidate.account
    model, engine = planned.model, settings.engine
    names = (model.name, str(settings.model))
    extra = ("--kv-cache-dtype", model.kv_dtype) if model.kv_dtype else ()
    threshold = ship_threshold(model, planned.cluster, layout, planned.workload.mean_context)
    return RunPlan(
        model_dir=str(settings.model),
        account=account,
        shares=layout_shares(model, layout, ship_below_rows=threshold) * layout.num_groups,
        cores=split_cores(layout.num_replicas),
        engine=EngineOptions(
            dtype=model.dtype,
            max_model_len=longest_row(model, account),
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            served_model_names=tuple(dict.fromkeys(names)),
            extra=extra,
        ),
        layout=layout,
        prediction=prediction_of(candidate.seconds, planned.workload, planned.cluster),
    )


def read_any_plan(path: Path) -> RunPlan:
    """A plan that ``elbowroom plan --json`` wrote. Raises InputError for anything else."""
    data = read_json(path)
    try:
        plan = RunPlan.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no plan of `elbowroom plan --json`: {error}") from error
    if plan.layout is None:
        raise InputError(f"{path} names no layout: make it again with `elbowroom plan --json`")
    return plan


def read_run_plan(path: Path) -> RunPlan:
    """A plan that this version can carry out. Raises InputError for any other."""
    plan = read_any_plan(path)
    layout = plan.layout
    assert layout is not None
    if layout.num_groups > 1 and layout.pool != "none":
        raise InputError(
            f"{path}: {layout} can be planned, but this version does not run several groups that "
            f"each share a pool"
        )
    check_fits(plan.account, plan.engine.max_model_len)
    return plan


def write_run_plan(path: Path, plan: RunPlan) -> None:
    """Raises OutputError."""
    text = json.dumps(plan.to_json(), indent=2) + "\n"
    write_atomically(path, iter([text.encode()]))


@dataclass(frozen=True)
class Predictor:
    """Says what a run of a layout on a job should take, before it and in hindsight.

    ``in_order`` takes the job's rows as they come in its file, else those of long outputs first.
    """

    model: ModelFacts
    cluster: Cluster
    layout: Layout
    account: MemoryAccount
    engine: EngineLimits
    lengths: FileLengths
    in_order: bool = False

    @cached_property
    def prediction(self) -> Prediction:
        """Of the job as it is expected. Raises MemoryPlanError when a row cannot fit."""
        return self._predict(self._workload)

    @property
    def ship_below_rows(self) -> int:
        context = self.lengths.workload.mean_context
        return ship_threshold(self.model, self.cluster, self.layout, context)

    @property
    def _workload(self) -> Workload:
        workload = self.lengths.workload
        return workload if self.in_order else workload.longest_first()

    def _predict(self, workload: Workload) -> Prediction:
        limits = replica_limits(self.account, self.engine)
        seconds = job_seconds(self.model, self.cluster, workload, self.layout, limits)
        return prediction_of(seconds, workload, self.cluster)

    def in_hindsight(self, prompt_tokens: int, output_tokens: int) -> Prediction | None:
        """With the tokens that came out, spread over rows as they were expected to be."""
        expected = self._workload
        prompts = prompt_tokens / expected.num_prompt_tokens
        came = expected.scaled(prompts, output_tokens / expected.num_output_tokens)
        try:
            return self._predict(came)
        except MemoryPlanError:  # what came out is longer than what was thought to fit
            return None


def prediction_of(seconds: float, workload: Workload, cluster: Cluster) -> Prediction:
    return Prediction(
        cluster=cluster.name,
        num_rows=workload.num_rows,
        prompt_tokens=workload.num_prompt_tokens,
        output_tokens=workload.num_output_tokens,
        seconds=seconds,
        low_seconds=seconds * (1 - cluster.uncertainty),
        high_seconds=seconds * (1 + cluster.uncertainty),
    )


def explain(planned: Planned, candidate: Candidate) -> list[Term]:
    """Every term of a candidate: its memory, an iteration at its usual batch, and its pool."""
    account, layout = candidate.account, candidate.layout
    times = pool_times(planned.model, planned.cluster, layout)
    rows = candidate.rows_at_once
    context = planned.workload.mean_context
    terms = [
        Term("memory", account.memory_bytes, "B", "what the engine may use of one device"),
        Term("- replicated", account.replicated_bytes, "B", "W_rest / t"),
        Term("- own FFN", account.ffn_bytes, "B", "W_ffn / (t d)"),
        Term("- slots", account.slot_bytes, "B", "slots x largest layer / t"),
        Term("- workspace", account.workspace_bytes, "B", "activations, logits"),
        Term("= KV", account.kv_bytes, "B", "sum"),
        Term("rows", rows, "", "KV tokens / mean row, at most max_num_seqs"),
        Term("context", context, "tokens", "prompt and half of the output, mean"),
        *times.cost.explain(Batch(rows, rows * context)),
    ]
    if layout.num_ranks > 1:
        fetch = times.fetch_seconds
        trip = times.cost.round_trip_seconds(rows, layout.num_ranks)
        threshold, hiding = times.threshold_batch(context), times.hiding_batch(context)
        never = float("inf")
        terms += [
            Term("fetch", fetch, "s", "borrowed layers / (link bandwidth x share of the link)"),
            Term("round trip", trip, "s", "rows of one layer to its owner and back"),
            Term("B_th", threshold or never, "rows", "smallest batch that streams no slower"),
            Term("B_hide", hiding or never, "rows", "smallest batch that hides the fetch"),
        ]
    return terms


def read_workload(
    lengths: str | None, path: Path | None, model_dir: Path, limits: RowLimits
) -> tuple[Workload, str]:
    """A job, and a line about it, from text for ``parse_lengths`` or from a batch file.

    Raises InputError for what cannot be read, and without either.
    """
    if lengths is not None:
        workload = parse_lengths(lengths)
        return workload, str(workload)
    if path is None:
        raise InputError("a plan needs to know the job: give --input or --lengths")
    of_file = read_lengths(path, model_dir, limits)
    return of_file.workload, str(of_file)


def find_cluster(
    name: str,
    cores: Sequence[Sequence[int]] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Cluster:
    """A preset, a file, or ``this-machine`` with one device per group of cores.

    A machine is measured when it is first asked for, and kept in the user's cache. One that cannot
    be written costs a measurement each time, and nothing else.
    """
    if name != THIS_MACHINE:
        return read_cluster(name)
    groups = cores or split_cores(len(os.sched_getaffinity(0)))
    path = cache_path(groups)
    if path.exists():
        return read_cluster(path)
    say(f"measuring this machine once, about twenty seconds; kept in {path}")
    cluster = measure_machine(groups)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, iter([cluster.to_toml().encode()]))
    except (OSError, OutputError) as error:
        say(f"cannot keep the measurement: {error}")
    return cluster


def cache_path(cores: Sequence[Sequence[int]]) -> Path:
    """Where the measurements of a machine lie whose cores are split in this way."""
    split = "_".join("-".join(map(str, group)) for group in cores)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "elbowroom" / f"machine-{split}.toml"


def calibrated(cluster: Cluster, report_path: Path) -> Cluster:
    """A cluster slowed down, or sped up, to what a run's report found against its prediction.

    Raises InputError when the report has no prediction to compare with.
    """
    report = read_json(report_path)
    predicted = report.get("hindsight") or (report.get("plan") or {}).get("prediction") or {}
    try:
        expected = predicted["output_tokens"] / predicted["seconds"]
        factor = expected / report["output_tokens_per_second"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{report_path} has no prediction beside its outcome: give the report.json of a run"
        ) from error
    slowed = replace(cluster.slowed(factor), uncertainty=min(0.1, cluster.uncertainty))
    note = f"a run took {factor:.3f} times as long as predicted: all device times are scaled"
    return replace(slowed, sources={**cluster.sources, "calibration": note})


def split_cores(num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """The cores of this process, divided among replicas; with too few, replicas share cores."""
    cores = sorted(os.sched_getaffinity(0))
    if num_replicas > len(cores):
        return tuple((cores[rank % len(cores)],) for rank in range(num_replicas))
    bounds = [rank * len(cores) // num_replicas for rank in range(num_replicas + 1)]
    return tuple(tuple(cores[start:end]) for start, end in pairwise(bounds))


def _is_asked(layout: Layout, settings: PlanSettings) -> bool:
    return (
        settings.tensor_parallel in (None, layout.tensor_parallel)
        and settings.replicas in (None, layout.num_replicas)
        and settings.slots in (None, layout.num_slots)
        and settings.pool in (None, layout.pool_name)
    )


def _storage(dtype: str | None, flag: str) -> str | None:
    if dtype is not None and dtype not in STORAGE_BYTES:
        raise InputError(f"{flag} '{dtype}' is not one of {', '.join(STORAGE_BYTES)}")
    return dtype


def _smallest_changes(
    settings: PlanSettings,
    model: ModelFacts,
    cluster: Cluster,
    workload: Workload,
    choice: Choice,
    search: Callable[[ModelFacts, Cluster, EngineLimits], Choice],
) -> Iterator[str]:
    """Single changes after which something fits, each tried."""
    nearest = min(choice.candidates, key=lambda c: c.missing_bytes)
    yield f"{format_bytes(nearest.missing_bytes)} more memory per device, for {nearest.layout}"
    free = replace(settings, tensor_parallel=None, replicas=None, pool=None, slots=None)
    if free != settings:
        layouts = list(enumerate_layouts(model, cluster))
        found = choose(model, cluster, workload, settings.engine, layouts).best
        if found is not None:
            yield f"another layout: {found.layout} fits"
    for flag, changed in (
        ("--kv-dtype fp8", replace(model, kv_dtype="fp8")),
        ("--weight-dtype fp8", replace(model, weight_dtype="fp8")),
    ):
        if changed == model:
            continue
        found = search(changed, cluster, settings.engine).best
        if found is not None:
            yield f"{flag}: {found.layout} fits"
    engine = settings.engine
    while engine.max_num_batched_tokens > 256 and engine.activation_bytes is None:
        engine = replace(engine, max_num_batched_tokens=engine.max_num_batched_tokens // 2)
        found = search(model, cluster, engine).best
        if found is not None:
            yield f"--max-num-batched-tokens {engine.max_num_batched_tokens}: {found.layout} fits"
            return


def check_possible(planned: Planned) -> Candidate:
    """The best candidate. Raises MemoryPlanError with the changes that would help."""
    if planned.choice.best is not None:
        return planned.choice.best
    changes = "; or ".join(planned.changes)
    raise MemoryPlanError(f"no layout of {planned.model.name} fits. What would: {changes}")
