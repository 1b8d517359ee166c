"""Limits that only the engine can tell: tokens of a prompt, seconds of a row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def _row(custom_id: str, content: str, **body: Any) -> str:
    messages = [{"role": "user", "content": content}]
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**line, "body": {"model": "demo", "messages": messages, **body}})


def _run(folder: Path, rows: list[str], *flags: str) -> dict[str, Any]:
    """Error of each failed row, None for each that was answered."""
    (folder / "in.jsonl").write_text("\n".join(rows))
    command = [
        *(sys.executable, "-m", "elbowroom", "run", "--model", str(DEMO / "model")),
        *("--served-model-name", "demo", "--input", str(folder / "in.jsonl")),
        *("--output", str(folder / "out.jsonl"), "--memory", "64MiB", *flags),
    ]
    assert subprocess.run(command, timeout=300).returncode == 3
    paths = (folder / "out.jsonl", folder / "out.errors.jsonl")
    lines = [json.loads(line) for path in paths for line in path.open()]
    return {line["custom_id"]: line["error"] for line in lines}


def test_rows_over_a_limit_fail_alone(tmp_path: Path) -> None:
    endless = _row("endless", "Compute 17 + 25.", max_tokens=900, n=8, ignore_eos=True)
    rows = [
        endless,
        _row("good", "Compute 17 + 25.", max_tokens=8),
        _row("long prompt", "Compute 17 + 25. " * 20, max_tokens=8),
        _row("good too", "Compute 17 + 26.", max_tokens=8),
    ]
    errors = _run(tmp_path, rows, "--max-prompt-tokens", "60", "--max-row-seconds", "2")
    assert errors["good"] is errors["good too"] is None
    assert errors["long prompt"]["code"] == "limit_exceeded"
    assert "more than --max-prompt-tokens 60" in errors["long prompt"]["message"]
    assert errors["endless"]["code"] == "row_timeout"
