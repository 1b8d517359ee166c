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


def test_a_row_over_a_limit_fails_alone(tmp_path: Path) -> None:
    rows = [
        _row("good", "Compute 17 + 25.", max_tokens=8),
        _row("long prompt", "Compute 17 + 25. " * 20, max_tokens=8),
        _row("endless", "Compute 17 + 25.", max_tokens=900, n=64, ignore_eos=True),
        _row("good too", "Compute 17 + 26.", max_tokens=8),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    command = [
        *(sys.executable, "-m", "elbowroom.cli", "run", "--model", str(DEMO / "model")),
        *("--served-model-name", "demo", "--input", str(tmp_path / "in.jsonl")),
        *("--output", str(tmp_path / "out.jsonl"), "--memory", "64MiB"),
        *("--max-prompt-tokens", "60", "--max-row-seconds", "3"),
    ]
    done = subprocess.run(command, timeout=200)
    assert done.returncode == 3
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [line["custom_id"] for line in answers] == ["good", "good too"]
    errors = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").open()]
    assert {line["custom_id"]: line["error"]["code"] for line in errors} == {
        "long prompt": "limit_exceeded",
        "endless": "row_timeout",
    }
    assert "more than --max-prompt-tokens 60" in errors[0]["error"]["message"]
