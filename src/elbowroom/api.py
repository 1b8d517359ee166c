"""Batch jobs from Python: the same plan, job and files as ``elbowroom run``."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elbowroom.core.model import ModelFacts, read_model
from elbowroom.core.plan import (
    POOL_MODES,
    EngineOptions,
    FetchOrder,
    MemoryAccount,
    PoolMode,
    PoolShare,
    RunPlan,
)
from elbowroom.core.units import format_bytes, parse_bytes
from elbowroom.jobs.identity import job_identity
from elbowroom.jobs.journal import FinishedRow, OnCommit
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.results import check_paths
from elbowroom.jobs.runner import JobFiles, JobOptions, StopRequest, run_job
from elbowroom.planning.memory import account_memory, check_fits, longest_row
from elbowroom.planning.pool import plan_shares

_QUEUE_ROWS = 1000


@dataclass(frozen=True)
class BatchSettings:
    """What ``elbowroom run`` is told. ``memory_bytes`` is the device memory of one replica.

    ``errors`` and ``report`` lie beside the output unless they are named. ``max_model_len`` None
    is the longest row that fits, ``slots`` None one less than there are replicas.
    """

    model: Path
    input: Path
    output: Path
    memory_bytes: int
    errors: Path | None = None
    report: Path | None = None
    logs: Path | None = None
    replicas: int = 1
    pool: PoolMode = "mapped"
    slots: int | None = None
    fetch_order: FetchOrder = "peak-shift"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    served_model_names: tuple[str, ...] = ()
    seed: int = 0
    prefix_caching: bool = True
    vllm_options: tuple[str, ...] = ()
    job: JobOptions = field(default_factory=JobOptions)

    def files(self) -> JobFiles:
        output = self.output
        return JobFiles(
            input=self.input,
            output=output,
            errors=self.errors or errors_beside(output),
            report=self.report or output.parent / f"{output.stem}.report.json",
            logs=self.logs,
        )

    def shares(self, model: ModelFacts, mode: PoolMode) -> tuple[PoolShare, ...]:
        return plan_shares(model.ffn_bytes(), self.replicas, mode, self.slots, self.fetch_order)

    def account(self, model: ModelFacts, mode: PoolMode) -> MemoryAccount:
        return account_memory(
            model,
            self.shares(model, mode),
            self.memory_bytes,
            self.max_num_batched_tokens,
            self.max_num_seqs,
        )

    def plan(self, model: ModelFacts) -> RunPlan:
        """Raises MemoryPlanError when no row would fit."""
        account = self.account(model, self.pool)
        names = (*self.served_model_names, model.name, str(self.model))
        hosts = sorted(self.job.limits.allowed_url_hosts)
        media = ("--allowed-media-domains", *hosts) if hosts else ()
        plan = RunPlan(
            model_dir=str(self.model),
            account=account,
            shares=self.shares(model, self.pool),
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
    """Plan and run. The account is shown before a layout that does not fit is refused."""
    files = settings.files()
    check_paths(files.input, files.output, files.errors, files.report)
    model = read_model(settings.model, settings.dtype)
    console.print(_account_table(settings, model))
    plan = settings.plan(model)
    identity = job_identity(settings.model, plan.engine)
    return await run_job(plan, files, settings.job, identity, console, stop, on_rows)


def errors_beside(output: Path) -> Path:
    return output.parent / f"{output.stem}.errors.jsonl"


def split_cores(num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """The cores of this process, divided among replicas; with too few, replicas share cores."""
    cores = sorted(os.sched_getaffinity(0))
    if num_replicas > len(cores):
        return tuple((cores[rank % len(cores)],) for rank in range(num_replicas))
    bounds = [rank * len(cores) // num_replicas for rank in range(num_replicas + 1)]
    return tuple(tuple(cores[start:end]) for start, end in pairwise(bounds))


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
    title = f"{model.name}: {settings.replicas} x {memory} ({model.dtype})"
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
