"""Batch jobs from Python: the same plan, job and files as ``elbowroom run``."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elbowroom.core.errors import InputError, MemoryPlanError
from elbowroom.core.model import ModelFacts, check_runnable, read_model
from elbowroom.core.plan import (
    POOL_MODES,
    EngineOptions,
    FetchOrder,
    Layout,
    MemoryAccount,
    PoolMode,
    RunPlan,
)
from elbowroom.core.units import format_bytes, parse_bytes
from elbowroom.jobs.identity import job_identity
from elbowroom.jobs.journal import FinishedRow, OnCommit
from elbowroom.jobs.lengths import read_lengths
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.results import check_paths
from elbowroom.jobs.runner import JobFiles, JobOptions, StopRequest, run_job
from elbowroom.planner import THIS_MACHINE, Predictor, find_cluster, split_cores
from elbowroom.planning.memory import check_fits, longest_row
from elbowroom.planning.search import EngineLimits, account_layout, engine_limits, layout_shares

PREDICTION_ROWS = 1000
"""Rows of the input that are counted for a prediction."""

_QUEUE_ROWS = 1000


@dataclass(frozen=True)
class BatchSettings:
    """What ``elbowroom run`` is told. ``memory_bytes`` is the memory of one device.

    A replica has ``tensor_parallel`` devices, each of which pools with its like in other replicas.

    ``errors`` and ``report`` lie beside the output unless they are named. ``max_model_len`` None
    is the longest row that fits, ``slots`` None one less than there are replicas. ``ship`` lets a
    streamed pool ship the rows of small batches, as the prediction advises. ``cluster`` is
    where predictions come from. ``given_plan`` says all that is asked of layout and engine.
    """

    model: Path
    input: Path
    output: Path
    memory_bytes: int
    errors: Path | None = None
    report: Path | None = None
    logs: Path | None = None
    replicas: int = 1
    tensor_parallel: int = 1
    pool: PoolMode = "mapped"
    slots: int | None = None
    fetch_order: FetchOrder = "peak-shift"
    ship: bool = True
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    served_model_names: tuple[str, ...] = ()
    seed: int = 0
    prefix_caching: bool = True
    vllm_options: tuple[str, ...] = ()
    job: JobOptions = field(default_factory=JobOptions)
    cluster: str = THIS_MACHINE
    given_plan: RunPlan | None = None

    def files(self) -> JobFiles:
        output = self.output
        return JobFiles(
            input=self.input,
            output=output,
            errors=self.errors or errors_beside(output),
            report=self.report or output.parent / f"{output.stem}.report.json",
            logs=self.logs,
        )

    def layout(self, mode: PoolMode) -> Layout:
        """Replicas without a pool are groups of one."""
        width = self.tensor_parallel
        if mode == "none":
            return Layout(width, 1, self.replicas, mode)
        slots = max(1, self.replicas - 1) if self.slots is None else self.slots
        if mode == "mapped":
            return Layout(width, self.replicas, 1, mode)
        ships = self.ship and self.replicas > 1
        return Layout(width, self.replicas, 1, mode, slots, ships)

    @property
    def engine_limits(self) -> EngineLimits:
        return EngineLimits(self.max_num_seqs, self.max_num_batched_tokens)

    def account(self, model: ModelFacts, mode: PoolMode) -> MemoryAccount:
        return account_layout(model, self.layout(mode), self.memory_bytes, self.engine_limits)

    def plan(self, model: ModelFacts) -> RunPlan:
        """What these settings ask for, or ``given_plan``. Raises MemoryPlanError if no row fits."""
        check_runnable(model)
        if model.num_heads % self.tensor_parallel:
            raise InputError(
                f"--tensor-parallel {self.tensor_parallel} does not divide the {model.num_heads} "
                f"attention heads of {model.name}: lower it"
            )
        if self.given_plan is not None:
            return replace(self.given_plan, cores=split_cores(self.given_plan.num_replicas))
        layout, account = self.layout(self.pool), self.account(model, self.pool)
        names = (*self.served_model_names, model.name, str(self.model))
        hosts = sorted(self.job.limits.allowed_url_hosts)
        media = ("--allowed-media-domains", *hosts) if hosts else ()
        plan = RunPlan(
            model_dir=str(self.model),
            account=account,
            shares=layout_shares(model, layout, self.fetch_order) * layout.num_groups,
            cores=split_cores(self.replicas),
            engine=EngineOptions(
                dtype=model.dtype,
                max_model_len=self.max_model_len or longest_row(model, account),
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                served_model_names=tuple(dict.fromkeys(names)),
                seed=self.seed,
                prefix_caching=self.prefix_caching,
                extra=(*media, *self.vllm_options),
            ),
            layout=layout,
        )
        check_fits(account, plan.engine.max_model_len)
        return plan


def run_batch(
    model: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    memory: int | str,
    console: Console | None = None,
    **options: Any,
) -> JobReport:
    """Answer an OpenAI batch file, or go on with it. Returns the report.

    ``memory`` is bytes, or text such as "2GiB". ``options`` are the other fields of
    ``BatchSettings``. Nothing is shown unless a ``console`` is given.

    Raises what ``jobs.runner.run_job`` raises, and MemoryPlanError before anything is loaded.
    """
    settings = _settings(model, input, output, memory, options)
    return asyncio.run(run_settings(settings, console or Console(quiet=True)))


def iter_batch(
    model: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    memory: int | str,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Answer a batch file, and yield the result lines of rows once they are safe on disk.

    Rows come as they finish, also failed ones; those that earlier runs finished do not come again.
    The files are published at the end as by ``run_batch``. Leaving the loop early stops the job
    after its rows in flight; the same call goes on with it.
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
    """Plan, predict and run. The account is shown before a layout that does not fit is refused."""
    files = settings.files()
    check_paths(files.input, files.output, files.errors, files.report)
    model = read_model(settings.model, settings.dtype)
    if settings.given_plan is None:
        console.print(_account_table(settings, model))
    plan = settings.plan(model)
    job, hindsight = settings.job, None
    predictor = _predictor(settings, model, plan, console)
    if predictor is not None:
        plan = replace(plan, prediction=predictor.prediction)
        if settings.given_plan is None:
            plan = plan.shipping_below(predictor.ship_below_rows)
        job = replace(job, bytes_per_token=predictor.lengths.bytes_per_token)
        hindsight = predictor.in_hindsight
    identity = job_identity(settings.model, plan.engine)
    return await run_job(plan, files, job, identity, console, stop, on_rows, hindsight)


def errors_beside(output: Path) -> Path:
    return output.parent / f"{output.stem}.errors.jsonl"


def _predictor(
    settings: BatchSettings, model: ModelFacts, plan: RunPlan, console: Console
) -> Predictor | None:
    """Of this job on this machine, whatever job and cluster a given plan was made for.

    None where it cannot be told: a job without rows that could be answered.
    """
    assert plan.layout is not None

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    cluster = find_cluster(settings.cluster, plan.cores, say)
    engine = engine_limits(plan.engine)
    try:
        lengths = read_lengths(settings.input, settings.model, settings.job.limits, PREDICTION_ROWS)
        in_order = settings.job.order == "input"
        predictor = Predictor(model, cluster, plan.layout, plan.account, engine, lengths, in_order)
        prediction = predictor.prediction
    except (InputError, MemoryPlanError) as error:
        say(f"no prediction: {error}")
        return None
    say(f"predicted for {lengths}: {prediction}")
    return predictor


def _settings(
    model: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    memory: int | str,
    options: dict[str, Any],
) -> BatchSettings:
    memory_bytes = parse_bytes(memory) if isinstance(memory, str) else memory
    return BatchSettings(Path(model), Path(input), Path(output), memory_bytes, **options)


def _account_table(settings: BatchSettings, model: ModelFacts) -> Table:
    """Where one replica's memory goes, for the layout asked for and for the others."""
    memory = format_bytes(settings.memory_bytes)
    num_devices = settings.replicas * settings.tensor_parallel
    title = f"{model.name}: {num_devices} x {memory} ({model.dtype})"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("pool", "replicated", "own FFN", "slots", "workspace", "KV", "KV tokens"):
        table.add_column(column, justify="right")
    for mode in POOL_MODES:
        account = settings.account(model, mode)
        table.add_row(
            f"> {mode}" if mode == settings.pool else mode,
            format_bytes(account.replicated_bytes),
            format_bytes(account.ffn_bytes),
            format_bytes(account.slot_bytes),
            format_bytes(account.workspace_bytes),
            format_bytes(account.kv_bytes),
            str(account.num_kv_tokens) if account.kv_bytes > 0 else "does not fit",
        )
    return table
