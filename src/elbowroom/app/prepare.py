"""A batch job before it starts: what is asked, what the planner decides, what it should take."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from elbowroom.app.gpu_machine import ONE_GPU, check_gpus, gpus_here
from elbowroom.app.machine import Say, device_cores, find_engine_cluster, split_cores
from elbowroom.app.plan import (
    Planned,
    check_possible,
    model_facts,
    plan_job,
    run_plan,
    served_names,
)
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.app.plan_table import print_plan_table
from elbowroom.app.predict import Predictor
from elbowroom.app.runnable import check_plan, check_room, check_tokenizer
from elbowroom.core import host
from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import InputError, MemoryPlanError, optional
from elbowroom.core.files import read_json
from elbowroom.core.model import ModelFacts, check_runnable
from elbowroom.core.options import option
from elbowroom.core.units import format_bytes
from elbowroom.core.workload import Workload, workload
from elbowroom.jobs.job import JobFiles, JobOptions, PredictActual, ScannedInput
from elbowroom.jobs.lengths import read_lengths
from elbowroom.jobs.parquet import is_named_parquet
from elbowroom.jobs.preflight import FileSummary, Warned, warnings
from elbowroom.planning.pool.layouts import NOT_BETWEEN_GPUS, engine_limits, replica_limits
from elbowroom.planning.pool.memory import check_fits, longest_row
from elbowroom.planning.pool.search import Candidate
from elbowroom.plans.pool import RunPlan

PREDICTION_ROWS = 1000
"""Rows of the input that are counted for a prediction."""

_UNKNOWN_ROWS = replace(workload([512] * 10_000, [256] * 10_000), is_bounded=False)
"""A job of which nothing is known."""


beside = partial(option, group="files beside the output")


@dataclass(frozen=True)
class BatchSettings:
    """What ``elbowroom run`` is told.

    ``errors`` and ``report`` lie beside the output unless they are named, and the replicas' logs in
    the journal's folder. ``given_plan`` says all that is asked of layout and engine.
    """

    inputs: tuple[Path, ...]
    output: Path
    plan: PlanSettings
    errors: Path | None = beside(None, "path", "failed rows (default: beside the output)")
    report: Path | None = beside(None, "path", "report.json (default: beside the output)")
    logs: Path | None = beside(
        None, "path", "folder for the replicas' logs (default: in the journal's)"
    )
    job: JobOptions = field(default_factory=JobOptions)
    given_plan: RunPlan | None = None

    @property
    def error_file(self) -> Path:
        return self.errors or errors_beside(self.output)

    @property
    def report_file(self) -> Path:
        return self.report or self.output.parent / f"{self.output.stem}.report.json"

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names under which rows may ask for the model."""
        if self.given_plan is not None:
            return self.given_plan.engine.served_model_names
        return served_names(self.plan.model, self.plan.served_model_names)

    @property
    def files(self) -> JobFiles:
        return JobFiles(self.output, self.error_file, self.report_file, self.logs)


@dataclass(frozen=True)
class Prepared:
    """A job that can start."""

    plan: RunPlan
    options: JobOptions
    predict_actual: PredictActual | None = None


def prepare(settings: BatchSettings, given: ScannedInput, console: Console, say: Say) -> Prepared:
    """Decide what was left open, and predict. Nothing is started.

    Raises InputError and UnsupportedModelError for a model that cannot be run, InputError too when
    no row could be answered, MemoryPlanError when none fits.
    """
    asked, batch = _asked(settings), given.batch
    for warning in _warnings(settings, given.summary):
        say(warning.text)
    model = model_facts(asked, say)
    check_runnable(model, asked.model, asked.pool)
    check_tokenizer(asked.model, asked.vllm_options)
    if settings.given_plan is not None:
        check_plan(settings.given_plan, model)
    lengths = None
    with optional("prediction", say):
        lengths = read_lengths(batch, asked.model, PREDICTION_ROWS)
    rows = None if lengths is None else lengths.workload
    if rows is not None and settings.job.order != "input":
        rows = rows.longest_first()
    if settings.given_plan is not None:
        plan = _renewed(settings.given_plan, batch.name, say)
        cluster = None
        with optional("prediction", say):
            cores = device_cores(plan)
            cluster = find_engine_cluster(asked.cluster, cores, plan.engine.dtype, say)
    else:
        planned, best = _decide(asked, model, rows, str(lengths), console, say)
        plan = run_plan(planned, best, asked, batch.name)
        if rows is None:
            plan = replace(plan, prediction=None)
        check_fits(plan.budget, plan.engine.max_model_len)
        _say_choice(planned, plan, asked, say)
        cluster = best.cluster if planned.machines.is_measured else None
    _check_machine(plan)
    options, predict_actual = settings.job, None
    if lengths is not None and rows is not None:
        options = replace(options, bytes_per_token=lengths.bytes_per_token)
        with optional("prediction", say):
            predictor = None if cluster is None else _predictor(plan, model, cluster, rows)
            if predictor is not None:
                plan = replace(plan, prediction=predictor.prediction)
                predict_actual = predictor.for_actual
                say(f"predicted for {lengths}: {predictor.prediction}")
    return Prepared(plan, options, predict_actual)


def _asked(settings: BatchSettings) -> PlanSettings:
    """What is asked of model and engine: what a given plan says, where there is one."""
    plan = settings.given_plan
    if plan is None:
        return settings.plan
    pool = plan.layout.pool if plan.layout else plan.shares[0].mode
    engine = plan.engine
    return replace(settings.plan, pool=pool, dtype=engine.dtype, vllm_options=engine.extra)


def _warnings(settings: BatchSettings, summary: FileSummary) -> Iterator[Warned]:
    """What the rows ask for in vain. Raises InputError when no row could be answered."""
    asked, given = settings.plan, settings.given_plan
    options = asked.vllm_options if given is None else given.engine.extra
    return warnings_for(summary, asked.model, settings.model_names, options)


def warnings_for(
    summary: FileSummary, model_dir: Path, served: Collection[str], vllm_options: Sequence[str]
) -> Iterator[Warned]:
    """``preflight.warnings`` about the model in a folder. Raises what they raise."""
    config = read_json(model_dir / "config.json")
    architectures = config.get("architectures") or ()
    if (model_dir / "modules.json").exists():  # of sentence-transformers: vLLM pools by itself
        architectures = ()
    return warnings(summary, served, architectures, vllm_options)


def errors_beside(output: Path) -> Path:
    """The file of failed rows, in the form of the output."""
    suffix = ".parquet" if is_named_parquet(output) else ".jsonl"
    return output.parent / f"{output.stem}.errors{suffix}"


def _decide(
    asked: PlanSettings,
    model: ModelFacts,
    rows: Workload | None,
    about_rows: str,
    console: Console,
    say: Say,
) -> tuple[Planned, Candidate]:
    """The best of the layouts that are allowed, which are shown.

    Rows that the model or the cache cannot hold will fail alone: they count for nothing. Raises
    MemoryPlanError, with the numbers, when no row fits.
    """
    most = asked.max_model_len or model.max_model_len
    rows = (rows and rows.within(most)) or _UNKNOWN_ROWS.within(most) or workload([1], [1])
    planned = plan_job(asked, model, rows, about_rows, say)
    if planned.choice.best is None:
        limits = [replica_limits(c.budget, c.engine) for c in planned.candidates]
        room = max(limit.longest_row(most) for limit in limits)
        fitting = rows.up_to(room)
        if fitting is not None and fitting.num_rows < rows.num_rows:
            num_longer = rows.num_rows - fitting.num_rows
            say(f"{num_longer} rows of more than {room} tokens do not fit: give more --memory")
            planned = plan_job(asked, model, fitting, about_rows, say, planned.machines)
    with optional("table of layouts", say):
        print_plan_table(console, planned)
    best = planned.choice.best
    if best is None:
        nearest = min(planned.candidates, key=lambda candidate: candidate.missing_bytes)
        longest = asked.max_model_len or longest_row(model, nearest.budget)
        check_fits(nearest.budget, longest)
        return planned, check_possible(planned)
    return planned, best


def _check_machine(plan: RunPlan) -> None:
    """Raise MemoryPlanError for more memory than this machine has, InputError for its GPUs."""
    if gpus := gpus_here():
        num_devices = plan.layout.num_devices if plan.layout else plan.num_replicas
        if plan.layout and plan.layout.tensor_parallel > len(gpus):
            raise InputError(
                f"--tensor-parallel {plan.layout.tensor_parallel} needs as many GPUs, and there "
                f"are {len(gpus)}"
            )
        check_gpus(gpus, num_devices, plan.budget.memory_bytes)
        if len(gpus) > 1 and plan.shares[0].mode != "none":
            raise InputError(f"{NOT_BETWEEN_GPUS}: {ONE_GPU}")
        return
    if plan.shared_bytes:
        check_room(plan.shared_bytes)
    there, asked = host.memory_bytes(), plan.num_replicas * plan.budget.memory_bytes
    if there is not None and asked > there:
        raise MemoryPlanError(
            f"{plan.num_replicas} replicas of {format_bytes(plan.budget.memory_bytes)} need more "
            f"than the {format_bytes(there)} that this machine has: lower --memory or --replicas"
        )


def _say_choice(planned: Planned, plan: RunPlan, asked: PlanSettings, say: Say) -> None:
    """What is taken, with which pool and why, and what the next best would take."""
    best, other = planned.choice.best, planned.choice.next_best
    assert best is not None
    budget = plan.budget.kv_tokens_text(plan.engine.max_model_len)
    say(
        f"taken: {best.describe()}, {plan.engine.dtype}: {budget} KV tokens, "
        f"{plan.engine.max_num_seqs} rows at once"
    )
    say(planned.describe_pool(best, asked))
    if other is not None and planned.machines.is_measured:
        longer = other.seconds / best.seconds
        say(f"next best: {other.describe()}: {longer:.2f}x as long, by prediction")


def _renewed(plan: RunPlan, source_name: str, say: Say) -> RunPlan:
    """A given plan on the cores that this process has."""
    if plan.made_for not in ("", source_name):
        say(f"the plan was made for {plan.made_for}, and is now run for {source_name}")
    return replace(plan, cores=split_cores(plan.num_replicas))


def _predictor(
    plan: RunPlan, model: ModelFacts, cluster: Cluster, rows: Workload
) -> Predictor | None:
    """None where no row fits."""
    assert plan.layout is not None
    limits = engine_limits(plan.engine)
    room = replica_limits(plan.budget, limits).longest_row(plan.engine.max_model_len)
    fitting = rows.within(plan.engine.max_model_len)
    fitting = fitting and fitting.up_to(room)
    if fitting is None:
        return None
    return Predictor(model, cluster, plan.layout, plan.budget, limits, fitting)
