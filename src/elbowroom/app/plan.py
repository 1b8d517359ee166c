"""From files to plans: what ``elbowroom plan`` does, and ``run`` before it starts anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from elbowroom.app.architecture import built_tensors
from elbowroom.app.gpu_machine import ONE_GPU
from elbowroom.app.machine import Machines, Say, find_machines, quiet, split_cores
from elbowroom.app.plan_settings import PlanSettings, is_asked
from elbowroom.app.predict import prediction_of
from elbowroom.app.runnable import check_quantised, takes_float32
from elbowroom.app.vllm_options import check_options, option_value, why_no_pool
from elbowroom.core import host
from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.model import STORAGE_BYTES, ModelFacts, model_name, read_model
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload, parse_lengths
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.identity import engine_version, is_for_gpus
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.lengths import read_lengths
from elbowroom.jobs.limits import RowLimits
from elbowroom.planning.pool.layouts import (
    MIXTURES_POOL,
    NOT_BETWEEN_GPUS,
    EngineLimits,
    enumerate_layouts,
    layout_shares,
    ship_threshold,
    why_not_run,
)
from elbowroom.planning.pool.memory import check_fits, longest_row
from elbowroom.planning.pool.search import (
    LEAST_TOKENS,
    Candidate,
    Choice,
    choose,
    first_that_fits,
    without_idle_cache,
)
from elbowroom.planning.pool.why_pool import describe_pool
from elbowroom.plans.pool import (
    EngineOptions,
    Layout,
    RunPlan,
    read_any_plan,
)


@dataclass(frozen=True)
class Planned:
    """Facts, and what was decided from them. ``changes`` would make an impossible job possible."""

    model: ModelFacts
    machines: Machines
    workload: Workload
    about_workload: str
    choice: Choice
    changes: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return self.choice.candidates

    def why_not_run(self, candidate: Candidate) -> str | None:
        """Why a candidate is there to be compared with only; None where it can be run."""
        return why_not_run(self.model, candidate.cluster, candidate.layout)

    @property
    def best_to_run(self) -> Candidate | None:
        """The fastest candidate that fits and that this version runs."""
        fitting = (c for c in self.candidates if c.fits and self.why_not_run(c) is None)
        return next(fitting, None)

    def describe_pool(self, best: Candidate, settings: PlanSettings) -> str:
        """The pool of a layout that is taken for this machine, and why, in one line."""
        return describe_pool(
            self.model, self.workload, best, self.candidates, settings.pool, settings.engine
        )

    @property
    def cluster(self) -> Cluster:
        best = self.choice.best
        return best.cluster if best else self.machines.clusters[0]


def plan_job(
    settings: PlanSettings,
    model: ModelFacts,
    rows: Workload,
    about_rows: str,
    say: Say = quiet,
    machines: Machines | None = None,
) -> Planned:
    """Compare layouts on a job, whose rows are in the order in which they are worked on.

    ``machines`` are those of an earlier look, else they are found. Raises InputError for names that
    cannot be used, and when no layout is as it is asked for.
    """
    rows, about_rows = _within_model(model, settings, rows, about_rows)
    if (settings.max_num_seqs or 0) > (settings.max_num_batched_tokens or inf):
        raise InputError(
            f"--max-num-batched-tokens {settings.max_num_batched_tokens} has no token for each of "
            f"--max-num-seqs {settings.max_num_seqs} rows: raise it, or lower the rows"
        )
    machines = machines or find_machines(
        settings.cluster,
        settings.num_devices,
        settings.memory_bytes,
        model.dtype,
        settings.calibrate,
        say,
        settings.runs_here,
    )

    def search(model: ModelFacts, machines: Machines, engine: EngineLimits) -> Choice:
        choices = []
        for cluster in machines.clusters:
            layouts = enumerate_layouts(model, cluster, settings.slots)
            asked = [x for x in layouts if is_asked(x, settings)]
            asked = [x for x in asked if _runs_here(x, model, cluster, settings)]
            if asked:
                choices.append(choose(model, cluster, rows, engine, asked))
        if not choices:
            raise InputError(_why_no_layout(settings, model, machines.clusters[0]))
        return first_that_fits(choices)

    choice = search(model, machines, settings.engine)
    changes: tuple[str, ...] = ()
    if choice.best is None:
        changes = tuple(_smallest_changes(settings, model, machines, rows, choice, search))
    return Planned(model, machines, rows, about_rows, choice, changes)


def model_facts(settings: PlanSettings, say: Say = quiet) -> ModelFacts:
    """Facts of the model, in the dtype in which it is to be computed.

    Raises InputError and UnsupportedModelError for what this machine's engine is known not to run.
    """
    check_options(settings.vllm_options)
    is_pooling = any("pooling" in option for option in settings.vllm_options)
    model = read_model(settings.model, settings.dtype, is_pooling, built_tensors)
    model = replace(model, cannot_pool=model.cannot_pool or why_no_pool(settings.vllm_options))
    on_gpus = settings.is_here and is_for_gpus(engine_version())
    asks_for_backend = option_value(settings.vllm_options, "--model-impl") == "transformers"
    kind = model.not_tried_on_gpus or ("--model-impl transformers" if asks_for_backend else None)
    if on_gpus and kind:
        why = f"no pool of {kind} has been run on GPUs"
        model = replace(model, cannot_pool=model.cannot_pool or why)
    is_free = settings.dtype == "auto" and takes_float32(model, settings.vllm_options)
    if settings.is_here and is_free and not on_gpus:
        dtype = host.fastest_dtype(model.dtype)
        if dtype != model.dtype:
            say(
                f"computed in {dtype}: this CPU has no instructions for {model.dtype} "
                f"(--dtype {model.dtype} asks for it all the same)"
            )
            model = replace(model, dtype=dtype)
    if settings.is_here and not on_gpus:  # on GPUs, vLLM has kernels for most
        check_quantised(model, settings.model, settings.vllm_options)
    return replace(
        model,
        weight_dtype=_storage(settings.weight_dtype, "--weight-dtype"),
        kv_dtype=_storage(settings.kv_dtype, "--kv-dtype"),
    )


def run_plan(
    planned: Planned, candidate: Candidate, settings: PlanSettings, made_for: str = ""
) -> RunPlan:
    """The plan that carries a layout out. Raises InputError for weights that are not there."""
    if planned.model.weight_dtype is not None:
        raise InputError(
            "--weight-dtype asks what if: convert the weights, and plan with what is stored then"
        )
    model, layout, engine = planned.model, candidate.layout, candidate.engine
    budget = candidate.budget
    if settings.is_here and settings.memory_bytes is None:
        budget = without_idle_cache(model, candidate, planned.workload)
    hosts = sorted(settings.limits.allowed_url_hosts)
    extra = (
        *(("--allowed-media-domains", *hosts) if hosts else ()),
        *settings.vllm_options,
    )
    threshold = ship_threshold(model, candidate.cluster, layout, planned.workload.mean_context)
    shares = layout_shares(model, layout, settings.fetch_order, threshold)
    if layout.pool == "none" and model.cannot_pool_here:  # all is vLLM's
        shares = tuple(replace(share, owners=()) for share in shares)
    prediction = None
    if planned.machines.is_measured:
        prediction = prediction_of(candidate.seconds, planned.workload, candidate.cluster)
    return RunPlan(
        model_dir=str(settings.model.absolute()),
        budget=budget,
        shares=shares * layout.num_groups,
        cores=split_cores(layout.num_replicas),
        engine=EngineOptions(
            dtype=model.dtype,
            max_model_len=engine.max_model_len or longest_row(model, budget),
            max_num_seqs=engine.num_rows,
            max_num_batched_tokens=engine.num_tokens,
            served_model_names=served_names(settings.model, settings.served_model_names),
            seed=settings.seed,
            # The state that layers of hybrids keep is no block that rows could share.
            prefix_caching=settings.prefix_caching and model.attention.is_known,
            kv_dtype=model.kv_dtype,
            extra=extra,
        ),
        layout=layout,
        prediction=prediction,
        made_for=made_for,
    )


def read_run_plan(path: Path) -> RunPlan:
    """A plan that this version can carry out. Raises InputError for any other."""
    plan = read_any_plan(path)
    layout = plan.layout
    assert layout is not None
    if not layout.is_run:
        raise InputError(
            f"{path}: {layout} can be planned, but this version does not run several groups that "
            f"each share a pool, nor pipelines, nor experts divided among replicas"
        )
    check_fits(plan.budget, plan.engine.max_model_len)
    return plan


def served_names(model_dir: Path, given: Iterable[str]) -> tuple[str, ...]:
    """The names under which rows may ask for a model: those given, and its own."""
    return tuple(dict.fromkeys((*given, model_name(model_dir), str(model_dir))))


def read_workload(
    lengths: str | None, inputs: Sequence[Path] | None, model_dir: Path, limits: RowLimits
) -> tuple[Workload, str]:
    """A job, and a line about it, from text for ``parse_lengths`` or from batch files.

    Raises InputError for what cannot be read, and without either.
    """
    if lengths is not None:
        rows = parse_lengths(lengths)
        return rows, str(rows)
    if inputs is None:
        raise InputError("a plan needs to know the job: give --input or --lengths")
    with BatchInput(inputs) as source, BatchFile(source, limits) as batch:
        of_file = read_lengths(batch.scan(), model_dir)
    return of_file.workload, str(of_file)


def _runs_here(layout: Layout, model: ModelFacts, cluster: Cluster, settings: PlanSettings) -> bool:
    """Whether a layout is left: on this machine, not what it cannot run."""
    can_pool = model.cannot_pool_here is None and why_not_run(model, cluster, layout) is None
    return not settings.is_here or layout.pool == "none" or can_pool


def _why_no_layout(settings: PlanSettings, model: ModelFacts, cluster: Cluster) -> str:
    """Which of the things asked for cannot be had."""
    width, replicas = settings.tensor_parallel or 1, settings.replicas
    if not model.divides_among(width):
        return (
            f"--tensor-parallel {width} does not divide the {model.num_heads} attention heads of "
            f"{model.name}, or the {model.num_kv_heads} of keys and values: lower it"
        )
    if settings.is_here and model.cannot_pool_here and settings.pool not in (None, "none"):
        return f"{model.name} cannot be pooled: {model.cannot_pool_here}. Use --pool none"
    if settings.is_here and model.experts and width > 1 and settings.pool not in (None, "none"):
        return f"{model.name}: {MIXTURES_POOL}. Leave out --tensor-parallel, or use --pool none"
    if settings.is_here and model.cannot_ship and settings.pool == "shipped":
        why = f"{model.name}: rows cannot be shipped: {model.cannot_ship}"
        return f"{why}. Use --pool mapped, streamed or none"
    if settings.is_here and not cluster.device.maps_peers and settings.pool not in (None, "none"):
        return f"{NOT_BETWEEN_GPUS}: {ONE_GPU}"
    if replicas == 1 and settings.pool not in (None, "none"):
        return "a pool is shared by replicas: give --replicas 2 or more, or --pool none"
    if cluster.num_devices % width or cluster.num_devices != width * (
        replicas or cluster.num_devices // width
    ):
        asked = f"{replicas} replicas of {width} devices" if replicas else f"{width} devices each"
        return f"{asked} cannot be had: {cluster.name} has {cluster.num_devices} devices"
    return "no layout is as all of these options want it: leave one of them out"


def _within_model(
    model: ModelFacts, settings: PlanSettings, rows: Workload, about_rows: str
) -> tuple[Workload, str]:
    """The job without rows that no engine would take. Raises InputError if that is all of them."""
    most = settings.max_model_len or model.max_model_len
    if rows.longest_row <= most:
        return rows, about_rows
    kept = rows.within(most)
    if kept is None:
        raise InputError(
            f"every row has more tokens than {model.name} takes: the shortest has "
            f"{rows.shortest_row}, and it takes {most}"
        )
    num_longer = rows.num_rows - kept.num_rows
    if not num_longer:
        return kept, about_rows
    return kept, f"{about_rows}; {num_longer} of more than {most} tokens are left out"


def _storage(dtype: str | None, flag: str) -> str | None:
    if dtype is not None and dtype not in STORAGE_BYTES:
        raise InputError(f"{flag} '{dtype}' is not one of {', '.join(STORAGE_BYTES)}")
    return dtype


def _smallest_changes(
    settings: PlanSettings,
    model: ModelFacts,
    machines: Machines,
    workload: Workload,
    choice: Choice,
    search: Callable[[ModelFacts, Machines, EngineLimits], Choice],
) -> Iterator[str]:
    """Single changes after which something fits, each tried."""
    nearest = min(choice.candidates, key=lambda c: c.missing_bytes)
    yield f"{format_bytes(nearest.missing_bytes)} more memory per device, for {nearest.layout}"
    free = replace(settings, tensor_parallel=None, replicas=None, pool=None, slots=None)
    if free != settings:
        cluster = machines.clusters[0]
        every = enumerate_layouts(model, cluster)
        layouts = [x for x in every if is_asked(x, free) and _runs_here(x, model, cluster, free)]
        found = choose(model, cluster, workload, settings.engine, layouts).best
        if found is not None:
            yield f"another layout: {found.layout} fits"
    for flag, changed in (
        ("--kv-dtype fp8", replace(model, kv_dtype="fp8")),
        ("--weight-dtype fp8", replace(model, weight_dtype="fp8")),
    ):
        if changed == model:
            continue
        found = search(changed, machines, settings.engine).best
        if found is not None:
            yield f"{flag}: {found.layout} fits"
    engine = replace(settings.engine, max_num_batched_tokens=settings.engine.num_tokens)
    while engine.num_tokens > LEAST_TOKENS and engine.activation_bytes is None:
        engine = replace(engine, max_num_batched_tokens=engine.num_tokens // 2)
        found = search(model, machines, engine).best
        if found is not None:
            yield f"--max-num-batched-tokens {engine.max_num_batched_tokens}: {found.layout} fits"
            return


def check_possible(planned: Planned) -> Candidate:
    """The best candidate. Raises MemoryPlanError with the changes that would help."""
    if planned.choice.best is not None:
        return planned.choice.best
    changes = "; or ".join(planned.changes)
    raise MemoryPlanError(f"no layout of {planned.model.name} fits. What would: {changes}")
