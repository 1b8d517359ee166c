"""Batch jobs from Python: the same plan, job and files as ``elbowroom run``."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from elbowroom.app.hub import find_model
from elbowroom.app.machine import Say, device_cores, find_cluster, split_cores
from elbowroom.app.plan import Planned, check_possible, model_facts, plan_job, run_plan
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.app.plan_table import print_plan_table
from elbowroom.app.predict import Predictor
from elbowroom.core import host
from elbowroom.core.cluster import Cluster
from elbowroom.core.errors import InputError, MemoryPlanError, optional
from elbowroom.core.files import check_writable
from elbowroom.core.model import ModelFacts, check_runnable
from elbowroom.core.units import format_bytes, parse_bytes
from elbowroom.core.workload import Workload, workload
from elbowroom.jobs.identity import engine_version, job_identity
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.job import Job, JobFiles, JobOptions, PredictActual, StopRequest
from elbowroom.jobs.journal import OnCommit
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.lengths import read_lengths
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.results import check_paths
from elbowroom.jobs.runner import run_job
from elbowroom.planning.pool.layouts import engine_limits, replica_limits
from elbowroom.planning.pool.memory import check_fits, longest_row
from elbowroom.planning.pool.search import Candidate
from elbowroom.plans.pool import RunPlan

PREDICTION_ROWS = 1000
"""Rows of the input that are counted for a prediction."""

_QUEUE_ROWS = 1000
_UNKNOWN_ROWS = replace(workload([512] * 10_000, [256] * 10_000), is_bounded=False)
"""A job of which nothing is known."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class BatchSettings:
    """What ``elbowroom run`` is told.

    ``errors`` and ``report`` lie beside the output unless they are named, and the replicas' logs in
    the journal's folder. ``given_plan`` says all that is asked of layout and engine.
    """

    inputs: tuple[Path, ...]
    output: Path
    plan: PlanSettings
    errors: Path | None = None
    report: Path | None = None
    logs: Path | None = None
    job: JobOptions = field(default_factory=JobOptions)
    given_plan: RunPlan | None = None

    def files(self, source: BatchInput) -> JobFiles:
        output = self.output
        return JobFiles(
            input=source,
            output=output,
            errors=self.errors or errors_beside(output),
            report=self.report or output.parent / f"{output.stem}.report.json",
            logs=self.logs,
        )


def run_batch(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    console: Console | None = None,
    **options: Any,
) -> JobReport:
    """Answer an OpenAI batch file, or several, or resume the job. Returns the report.

    ``memory`` of one replica is bytes, or text such as "2GiB"; by default it is what is free.
    ``options`` are the other fields of ``BatchSettings`` and ``PlanSettings``. Nothing is shown
    unless a ``console`` is given.

    Raises what ``jobs.runner.run_job`` raises, and MemoryPlanError before anything is loaded.
    """
    settings = _settings(model, input, output, memory, options)
    return asyncio.run(run_settings(settings, console or Console(quiet=True)))


def iter_batch(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Answer a batch file, and yield the result lines of rows once they are safe on disk.

    Rows come as they finish, also failed ones; those that earlier runs finished do not come again.
    The files are published at the end as by ``run_batch``. Leaving the loop early stops the job
    after its rows in flight; the same call resumes it.
    """
    settings = _settings(model, input, output, memory, options)
    finished: queue.Queue[FinishedRow | BaseException | None] = queue.Queue(_QUEUE_ROWS)
    stop = StopRequest()

    def work() -> None:
        def put(rows: Sequence[FinishedRow]) -> None:
            for row in rows:
                if stop.reason is None:
                    finished.put(row)

        try:
            asyncio.run(run_settings(settings, Console(quiet=True), stop, put))
            finished.put(None)
        except BaseException as error:
            finished.put(error)

    worker = threading.Thread(target=work, name="elbowroom-batch")
    worker.start()
    try:
        while (item := finished.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield json.loads(item.line)
    finally:
        stop("the loop was left")
        while worker.is_alive():
            try:
                finished.get(timeout=0.1)
            except queue.Empty:
                continue


async def run_settings(
    settings: BatchSettings,
    console: Console,
    stop: StopRequest | None = None,
    on_rows: OnCommit | None = None,
) -> JobReport:
    """Plan, predict and run. What was compared is shown before a job that does not fit is refused.

    Raises what ``jobs.runner.run_job`` raises, and MemoryPlanError before anything is loaded.
    """

    def say(text: str) -> None:
        with suppress(Exception):  # the terminal may be gone, and the job is not
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    if importlib.util.find_spec("vllm") is None:
        raise InputError("to run a model needs vLLM: pip install 'elbowroom[cpu]', or [cuda]")
    _check_devices(settings)
    output = settings.output
    report = settings.report or output.parent / f"{output.stem}.report.json"
    check_paths(settings.inputs, output, settings.errors or errors_beside(output), report)
    if settings.logs is not None:
        check_writable([settings.logs / "replica-0.log"])
    with BatchInput(settings.inputs, output.parent) as source:
        prepared = prepare(settings, source, console, say)
        identity = job_identity(Path(prepared.plan.model_dir), prepared.plan.engine)
        job = Job(
            plan=prepared.plan,
            files=settings.files(source),
            identity=identity,
            options=prepared.options,
            console=console,
            stop=stop or StopRequest(),
            on_rows=on_rows,
            predict_actual=prepared.predict_actual,
        )
        return await run_job(job)


def _check_devices(settings: BatchSettings) -> None:
    """Raise InputError where nothing is known of the devices that the engine would run on."""
    asked, version = settings.plan, engine_version()
    is_open = None in (asked.memory_bytes, asked.replicas, asked.pool) or asked.dtype == "auto"
    on_gpus = version.startswith("vllm ") and "+cpu" not in version
    if on_gpus and is_open and settings.given_plan is None:
        raise InputError(
            f"{version} runs on GPUs, of which nothing is decided yet: give --replicas 1, "
            f"--pool none, --dtype and the --memory of one device"
        )


@dataclass(frozen=True)
class Prepared:
    """A job that can start."""

    plan: RunPlan
    options: JobOptions
    predict_actual: PredictActual | None = None


def prepare(settings: BatchSettings, source: BatchInput, console: Console, say: Say) -> Prepared:
    """Decide what was left open, and predict. Nothing is started.

    Raises InputError and UnsupportedModelError for a model that cannot be run, MemoryPlanError when
    no row fits.
    """
    asked = settings.plan
    model = model_facts(asked, say)
    check_runnable(model)
    lengths = None
    with optional("prediction", say):
        lengths = read_lengths(source, asked.model, settings.job.limits, PREDICTION_ROWS)
    rows = None if lengths is None else lengths.workload
    if rows is not None and settings.job.order != "input":
        rows = rows.longest_first()
    if settings.given_plan is not None:
        plan = _renewed(settings.given_plan, source.name, say)
        cluster = None
        with optional("prediction", say):
            cluster = find_cluster(asked.cluster, device_cores(plan), plan.engine.dtype, say)
    else:
        planned, best = _decide(asked, model, rows, str(lengths), console, say)
        plan = run_plan(planned, best, asked, source.name)
        if rows is None:
            plan = replace(plan, prediction=None)
        check_fits(plan.budget, plan.engine.max_model_len)
        _check_machine(plan)
        _say_choice(planned, plan, say)
        cluster = best.cluster if planned.machines.is_measured else None
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


def errors_beside(output: Path) -> Path:
    return output.parent / f"{output.stem}.errors.jsonl"


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
    most = asked.max_model_len or model.max_position_embeddings
    rows = (rows and rows.within(most)) or _UNKNOWN_ROWS.within(most) or workload([1], [1])
    planned = plan_job(asked, model, rows, about_rows, say)
    if planned.choice.best is None:
        room = max(replica_limits(c.budget, c.engine).num_kv_tokens for c in planned.candidates)
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
    """Raise MemoryPlanError for more memory than this machine has."""
    there, asked = host.memory_bytes(), plan.num_replicas * plan.budget.memory_bytes
    if there is not None and asked > there:
        raise MemoryPlanError(
            f"{plan.num_replicas} replicas of {format_bytes(plan.budget.memory_bytes)} need more "
            f"than the {format_bytes(there)} that this machine has: lower --memory or --replicas"
        )


def _say_choice(planned: Planned, plan: RunPlan, say: Say) -> None:
    """What is taken, and what the next best would take."""
    best, other = planned.choice.best, planned.choice.next_best
    assert best is not None
    say(
        f"taken: {best.describe()}, {plan.engine.dtype}: {plan.budget.num_kv_tokens} KV tokens, "
        f"{plan.engine.max_num_seqs} rows at once"
    )
    if other is not None and planned.machines.is_measured:
        longer = other.seconds / best.seconds
        say(f"next best: {other.describe()}: {longer:.2f}x as long, as far as can be told")


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
    room = replica_limits(plan.budget, limits).num_kv_tokens
    fitting = rows.within(plan.engine.max_model_len)
    fitting = fitting and fitting.up_to(room)
    if fitting is None:
        return None
    return Predictor(model, cluster, plan.layout, plan.budget, limits, fitting)


def _settings(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    memory: int | str | None,
    options: dict[str, Any],
) -> BatchSettings:
    """Options go to the plan or to the job, by their names. Raises TypeError for others."""
    inputs = [input] if isinstance(input, str | os.PathLike) else input
    revision = options.pop("revision", None)
    planned = {f.name for f in fields(PlanSettings)} - {"limits", "runs_here"}
    of_plan = {name: value for name, value in options.items() if name in planned}
    of_job = {name: value for name, value in options.items() if name not in planned}
    job = options.get("job", JobOptions())
    plan = PlanSettings(
        model=find_model(os.fspath(model), revision),
        memory_bytes=parse_bytes(memory) if isinstance(memory, str) else memory,
        limits=job.limits,
        runs_here=True,
        **of_plan,
    )
    return BatchSettings(tuple(map(Path, inputs)), Path(output), plan, **of_job)
