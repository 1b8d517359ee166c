"""One batch file, answered by ``elbowroom run`` and by vLLM's own ``run-batch``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elbowroom.plans.pool import RunPlan

ROOT = Path(__file__).parents[2]


def write_chats(path: Path, bodies: Iterable[dict[str, Any]]) -> Path:
    """A batch file of chat requests, numbered from 0."""
    with path.open("w") as file:
        for index, body in enumerate(bodies):
            line = {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")
    return path


def elbowroom_command(model: Path, requests: Path, output: Path, *flags: str) -> list[str]:
    files = ("--model", str(model), "--input", str(requests), "--output", str(output))
    return [sys.executable, "-m", "elbowroom", "run", *files, *flags]


def run_elbowroom(
    model: Path, requests: Path, output: Path, *flags: str, timeout: float = 300
) -> Any:
    """Answer the file into ``output``, and give the report."""
    command = elbowroom_command(model, requests, output, *flags)
    subprocess.run(command, check=True, timeout=timeout)
    return json.loads(output.with_suffix(".report.json").read_text())


def settings_of(plan: RunPlan) -> tuple[str, ...]:
    """Flags of vLLM that give it the cache and the dtype of ``plan``."""
    return ("--kv-cache-memory-bytes", str(plan.budget.kv_bytes), "--dtype", plan.engine.dtype)


def run_vllm(model: Path, requests: Path, output: Path, *flags: str, timeout: float = 300) -> None:
    """Answer the file by vLLM alone, without replicas, plan or pool."""
    module = "vllm.entrypoints.openai.run_batch"
    files = ("-i", str(requests), "-o", str(output), "--model", str(model))
    options = (*flags, "--block-size", "32", "--enforce-eager")
    command = [sys.executable, "-m", module, *files, *options]
    subprocess.run(command, check=True, timeout=timeout, cwd=ROOT)


def choices(output: Path) -> dict[str, Any]:
    """The one choice of each row, by ``custom_id``: text, why it ended, and log-probabilities."""
    rows = map(json.loads, output.read_text().splitlines())
    return {row["custom_id"]: row["response"]["body"]["choices"][0] for row in rows}


def texts(output: Path) -> dict[str, str]:
    """The text of each row, by ``custom_id``."""
    return {name: choice["message"]["content"] for name, choice in choices(output).items()}
