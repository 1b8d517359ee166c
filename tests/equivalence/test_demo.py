"""The demo model's 500 answers do not depend on the layout, nor on Elbowroom at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elbowroom.engine.vllm_seam import ENVIRONMENT
from tests.demo_job import DEMO, DemoJob

pytestmark = pytest.mark.vllm


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


def test_answers_equal_plain_vllm(undisturbed: DemoJob, plain_answers: dict[str, str]) -> None:
    check("streamed", undisturbed.output, plain_answers)


@pytest.mark.nightly
@pytest.mark.parametrize("pool", ["none", "mapped"])
def test_other_pools(pool: str, plain_answers: dict[str, str], tmp_path: Path) -> None:
    job = DemoJob(tmp_path / "job")
    job.start(pool)
    assert job.end() == 0
    check(pool, job.output, plain_answers)


def check(pool: str, output: Path, plain_answers: dict[str, str]) -> None:
    """Answers are those of plain vLLM, memory is as planned, and the pool is as asked."""
    assert len(plain_answers) == 500
    assert _answers(output) == plain_answers
    report = json.loads(output.with_suffix(".report.json").read_text())
    budget = report["plan"]["budget"]
    for replica in report["replicas"]:
        expected = budget["kv_bytes"] // budget["kv_bytes_per_token"]
        assert replica["num_kv_tokens"] == pytest.approx(expected, rel=0.01)
        assert (replica["pool"]["streamed_bytes"] > 0) == (pool == "streamed")
        assert (replica["pool"]["mapped_bytes"] > 0) == (pool == "mapped")


def _answers(output: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }
