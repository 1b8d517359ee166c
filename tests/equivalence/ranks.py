"""Groups of ranks, each of which answers cases in a process of its own (``rank.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from elbowroom.core.model import read_model
from elbowroom.engine.vllm_seam import ENVIRONMENT
from elbowroom.engine.vllm_seam.plugin import CONFIG_KEY
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.run_dir import run_directory

ROOT = Path(__file__).parents[2]


def ffn_bytes(path: Path) -> tuple[int, ...]:
    return read_model(path).ffn_bytes()


def pooled_case(path: Path, share: PoolShare) -> dict[str, Any]:
    pool = {"share": share.to_json()}
    return {"model_dir": str(path), "additional_config": {CONFIG_KEY: pool}}


def run_ranks(cases: list[list[dict[str, Any]]], folder: Path) -> list[list[Any]]:
    """Run every rank's cases, all ranks at once. Case i of all ranks meets in directory i.

    A case without ``additional_config`` is plain vLLM.
    """
    with run_directory() as run_dir:
        for rank, of_rank in enumerate(cases):
            for index, case in enumerate(of_rank):
                meeting = run_dir / str(index)
                meeting.mkdir(mode=0o700, exist_ok=True)
                if "additional_config" in case:
                    case["additional_config"][CONFIG_KEY]["run_dir"] = str(meeting)
            (folder / f"cases-{rank}.json").write_text(json.dumps(of_rank))
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.equivalence.rank"),
                    str(folder / f"cases-{rank}.json"),
                    str(folder / f"results-{rank}.json"),
                ],
                cwd=ROOT,
                env={**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(len(cases))
        ]
        try:
            assert [process.wait(timeout=500) for process in processes] == [0] * len(cases)
        finally:
            for process in processes:
                process.kill()
    return [json.loads((folder / f"results-{r}.json").read_text()) for r in range(len(cases))]
