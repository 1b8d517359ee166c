"""Groups of ranks, each of which answers cases in a process of its own (``rank.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elbowroom.core.model import read_model
from elbowroom.engine.vllm_seam import ENVIRONMENT
from elbowroom.engine.vllm_seam.plugin import CONFIG_KEY
from elbowroom.plans.pool import PoolShare
from elbowroom.pool.run_dir import run_directory

ROOT = Path(__file__).parents[2]

KV_BYTES = 4 << 20
LONGEST = 256
MOST_TOKENS = 128
"""Tokens of an iteration: less than the longest prompt, and a window that many keep more of."""


@dataclass(frozen=True)
class Result:
    """What one case gave. ``rows`` has, for each prompt, its tokens and their log-probabilities.

    ``pooled`` names the classes of modules in the pool. Where a case failed, which it must be
    allowed to, there is an ``error`` and nothing else.
    """

    rows: tuple[Any, ...] = ()
    num_kv_tokens: int = 0
    block_tokens: int = 0
    pooled: tuple[str, ...] = ()
    error: str | None = None


def ffn_bytes(path: Path) -> tuple[int, ...]:
    return read_model(path).ffn_bytes()


def pooled_case(path: Path, share: PoolShare) -> dict[str, Any]:
    pool = {"share": share.to_json()}
    return {"model_dir": str(path), "additional_config": {CONFIG_KEY: pool}}


def run_ranks(
    cases: list[list[dict[str, Any]]], folder: Path, may_end: bool = False
) -> list[list[Result]]:
    """Run every rank's cases, all ranks at once. Case i of all ranks meets in directory i.

    A case without ``additional_config`` is plain vLLM. One that has ``may_fail`` gives an error
    instead of rows; with ``may_end``, its process may end with it, which is an error, too.
    """
    with run_directory() as run_dir:
        for rank, of_rank in enumerate(cases):
            for index, case in enumerate(of_rank):
                meeting = run_dir / str(index)
                meeting.mkdir(mode=0o700, exist_ok=True)
                if "additional_config" in case:
                    case["additional_config"][CONFIG_KEY]["run_dir"] = str(meeting)
            (folder / f"cases-{rank}.json").write_text(json.dumps(of_rank))
            (folder / f"results-{rank}.json").write_text("[]")
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.equivalence.rank"),
                    str(folder / f"cases-{rank}.json"),
                    str(folder / f"results-{rank}.json"),
                ],
                cwd=ROOT,
                stdout=2,  # what vLLM says is no result
                env={**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(len(cases))
        ]
        try:
            codes = [process.wait(timeout=400 + 100 * len(cases[0])) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert may_end or codes == [0] * len(cases)
    results = [json.loads((folder / f"results-{r}.json").read_text()) for r in range(len(cases))]
    return [
        [*map(_result, found), *[Result(error=f"ended with {code}")] * (len(wanted) - len(found))]
        for wanted, found, code in zip(cases, results, codes, strict=True)
    ]


def _result(data: dict[str, Any]) -> Result:
    return Result(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})
