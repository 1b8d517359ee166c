"""Small plans and batch files for tests of jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from elbowroom.app.plan import check_possible, model_facts, plan_job, run_plan
from elbowroom.app.plan_settings import PlanSettings
from elbowroom.core.workload import parse_lengths
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.lengths import FileLengths, read_lengths
from elbowroom.jobs.limits import RowLimits
from elbowroom.planning.pool.shares import plan_shares
from elbowroom.plans.pool import EngineOptions, MemoryBudget, PoolMode, RunPlan


def make_plan(num_replicas: int = 1, mode: PoolMode = "mapped", max_num_seqs: int = 8) -> RunPlan:
    """A plan for a model that is not there."""
    budget = MemoryBudget(
        memory_bytes=2**30,
        replicated_bytes=2**20,
        ffn_bytes=2**20,
        slot_bytes=0,
        workspace_bytes=2**20,
        kv_bytes=2**30 - 3 * 2**20,
        kv_bytes_per_token=1024,
        block_tokens=32,
    )
    return RunPlan(
        model_dir="/no/model",
        budget=budget,
        shares=plan_shares((100,) * 4, num_replicas, mode),
        cores=((),) * num_replicas,
        engine=EngineOptions("bfloat16", 128, max_num_seqs, 64, ("stub",)),
    )


def plan_here(settings: PlanSettings) -> RunPlan:
    """The plan for a job of short rows on this machine, as ``run`` would make it."""
    settings = replace(settings, runs_here=True)
    rows = parse_lengths("20:16x100")
    planned = plan_job(settings, model_facts(settings), rows, str(rows))
    return run_plan(planned, check_possible(planned), settings)


def write_batch(path: Path, num_rows: int, **body: Any) -> Path:
    """Rows ``id-0``, ``id-1`` ... that each ask for their own number."""
    with path.open("w") as file:
        for index in range(num_rows):
            row = {
                "custom_id": f"id-{index}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": f"say {index}", "max_tokens": 8, **body},
            }
            file.write(json.dumps(row) + "\n")
    return path


def lengths_of(
    path: Path,
    model_dir: Path,
    limits: RowLimits = RowLimits(),  # noqa: B008 (it is frozen)
    max_rows: int | None = None,
) -> FileLengths:
    with BatchFile(path, limits) as batch:
        return read_lengths(batch.scan(), model_dir, max_rows)
