"""Batch jobs from Python: the same plan, job and files as ``elbowroom run``."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from elbowroom.app.hub import find_model
from elbowroom.app.machine import THIS_MACHINE
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.app.prepare import BatchSettings, prepare
from elbowroom.core.errors import InputError, shown
from elbowroom.core.files import check_writable
from elbowroom.core.options import option_names, read_options
from elbowroom.jobs.identity import job_identity
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.job import Job, JobOptions, StopRequest, say_on
from elbowroom.jobs.journal import OnCommit
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.results import check_paths
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned

_QUEUE_ROWS = 1000
_WORDS = ["--runner", "pooling"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def run_batch(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    *,
    console: Console | None = None,
    **options: Any,
) -> JobReport:
    """Answer an OpenAI batch file, or several, or resume the job. Returns the report.

    ``options`` are those of ``elbowroom run`` by the names of their flags, such as ``replicas=2``,
    ``memory="2GiB"`` or ``max_num_seqs=64``. ``vllm_options`` is the list of words that stand
    behind ``--`` there, and ``given_plan`` a ``RunPlan`` instead of ``--plan``. Nothing is shown
    unless a ``console`` is given.

    Raises what ``jobs.runner.run_job`` raises, and MemoryPlanError before anything is loaded.
    """
    settings = _settings(model, input, output, options)
    return _complete(run_settings(settings, console or Console(quiet=True)))


def _complete(job: Coroutine[Any, Any, JobReport]) -> JobReport:
    """Run a job to its end: on a thread of its own where this one has an event loop (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1, "elbowroom-batch") as thread:
        return thread.submit(asyncio.run, job).result()


def iter_batch(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Answer a batch file, and yield the result lines of rows once they are safe on disk.

    Rows come as they finish, also failed ones; those that earlier runs finished do not come again.
    The files are published at the end as by ``run_batch``. Leaving the loop early stops the job
    after its rows in flight; the same call resumes it.
    """
    settings = _settings(model, input, output, options)
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
    if importlib.util.find_spec("vllm") is None:
        raise InputError("to run a model needs vLLM: pip install 'elbowroom[cpu]', or [cuda]")
    output = settings.output
    check_paths(
        settings.inputs,
        output,
        settings.error_file,
        settings.report_file,
        overwrite=settings.job.overwrite,
    )
    if settings.logs is not None:
        check_writable([settings.logs / "replica-0.log"])
    with (
        BatchInput(settings.inputs, output.parent) as source,
        scanned(source, settings.job, settings.model_names) as rows,
    ):
        prepared = prepare(settings, rows, console, partial(say_on, console))
        own = (*settings.inputs, output, settings.error_file, settings.report_file)
        identity = job_identity(Path(prepared.plan.model_dir), prepared.plan.engine, own)
        job = Job(
            plan=prepared.plan,
            input=rows,
            files=settings.files,
            identity=identity,
            options=prepared.options,
            console=console,
            stop=stop or StopRequest(),
            on_rows=on_rows,
            predict_actual=prepared.predict_actual,
        )
        return await run_job(job)


def _settings(
    model: str | os.PathLike[str],
    input: Paths,
    output: str | os.PathLike[str],
    options: dict[str, Any],
) -> BatchSettings:
    """Options go by their names to the plan, the job or the limits of a row.

    Raises TypeError for other names, InputError for what an option cannot be.
    """
    inputs = [input] if isinstance(input, str | os.PathLike) else input
    limits = RowLimits(**_taken(RowLimits, options))
    asked = _taken(PlanSettings, options)
    job = JobOptions(limits=limits, **_taken(JobOptions, options))
    files = _taken(BatchSettings, options)
    given_plan, revision = options.pop("given_plan", None), options.pop("revision", None)
    cluster = os.fspath(options.pop("cluster", THIS_MACHINE))
    words = options.pop("vllm_options", ())
    if isinstance(words, str):
        raise InputError(f"vllm_options={shown(words)}: give a list of words, such as {_WORDS}")
    for name in options:
        raise TypeError(f"a batch has no option '{name}'")
    plan = PlanSettings(
        model=find_model(os.fspath(model), revision),
        cluster=cluster,
        vllm_options=tuple(words),
        limits=limits,
        runs_here=True,
        **asked,
    )
    paths = tuple(map(Path, inputs))
    return BatchSettings(paths, Path(output), plan, job=job, given_plan=given_plan, **files)


def _taken(settings: type, options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a dataclass out of others, and read them."""
    own = {name: options.pop(name) for name in option_names(settings) if name in options}
    return read_options(settings, own)
