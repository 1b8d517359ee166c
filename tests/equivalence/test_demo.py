"""The demo model's 500 answers do not depend on the layout, nor on Elbowroom at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elbowroom.engine.vllm_seam import ENVIRONMENT

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"


@pytest.fixture(scope="module")
def plain_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What vLLM's own batch runner answers, without Elbowroom's kernel, plugin or processes."""
    output = tmp_path_factory.mktemp("plain") / "plain.jsonl"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "--enforce-eager"),
        *("-i", str(DEMO / "requests.jsonl"), "-o", str(output), "--model", str(DEMO / "model")),
        *("--served-model-name", "demo", "--kv-cache-memory-bytes", str(64 << 20)),
    ]
    environment = {**ENVIRONMENT, **os.environ}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a user of vLLM has its default
    subprocess.run(command, check=True, env=environment, timeout=300)
    return _answers(output)


@pytest.mark.parametrize(
    "pool",
    [
        "streamed",
        pytest.param("none", marks=pytest.mark.nightly),
        pytest.param("mapped", marks=pytest.mark.nightly),
    ],
)
def test_answers_equal_plain_vllm(pool: str, plain_answers: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    command = [
        *(sys.executable, "-m", "elbowroom", "run", "--model", str(DEMO / "model")),
        *("--served-model-name", "demo", "--input", str(DEMO / "requests.jsonl")),
        *("--output", str(output), "--replicas", "2", "--memory", "64MiB", "--pool", pool),
    ]
    subprocess.run(command, check=True, timeout=300)
    assert len(plain_answers) == 500
    assert _answers(output) == plain_answers
    report = json.loads(output.with_suffix(".report.json").read_text())
    expected = (
        report["plan"]["budget"]["kv_bytes"] // report["plan"]["budget"]["kv_bytes_per_token"]
    )
    for replica in report["replicas"]:
        assert replica["num_kv_tokens"] == pytest.approx(expected, rel=0.01)
        assert (replica["pool"]["streamed_bytes"] > 0) == (pool == "streamed")
        assert (replica["pool"]["mapped_bytes"] > 0) == (pool == "mapped")


def _answers(output: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }
