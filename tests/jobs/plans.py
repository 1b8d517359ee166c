"""Small plans and batch files for tests of jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elbowroom.core.plan import EngineOptions, MemoryAccount, PoolMode, RunPlan
from elbowroom.planning.pool import plan_shares


def make_plan(num_replicas: int = 1, mode: PoolMode = "mapped", max_num_seqs: int = 8) -> RunPlan:
    """A plan for a model that is not there."""
    account = MemoryAccount(
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
        account=account,
        shares=plan_shares((100,) * 4, num_replicas, mode),
        cores=((),) * num_replicas,
        engine=EngineOptions("bfloat16", 128, max_num_seqs, 64, ("stub",)),
    )


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
