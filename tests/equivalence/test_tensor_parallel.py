"""Replicas of two devices: every layout gives what they give without a pool."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.make_model import make_model

from elbowroom.app.plan_settings import PlanSettings
from elbowroom.core.units import MIB
from elbowroom.plans.pool import write_run_plan
from tests.jobs.plans import plan_here

# Nightly, as one of 26 starts so far failed: a worker of vLLM's ended. And it takes minutes.
pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

NUM_ROWS = 12
ALWAYS = 10**6


def test_pooled_equals_plain(tmp_path: Path) -> None:
    """Two replicas of two ranks each: tokens and log-probabilities, to the last bit."""
    model = make_model(tmp_path / "tiny", "llama", num_layers=5)
    chance = random.Random(0)
    requests = tmp_path / "in.jsonl"
    with requests.open("w") as file:
        for index in range(NUM_ROWS):
            prompt = [chance.randrange(5, 60) for _ in range(chance.randint(1, 90))]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "logprobs": 3}
            body |= {"temperature": 0, "ignore_eos": True}
            line = {"custom_id": str(index), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")
    answers = {
        mode: _run(model, requests, mode) for mode in ("none", "mapped", "streamed", "shipped")
    }
    for mode in answers:
        assert answers[mode] == answers["none"], mode
    assert len({json.dumps(answer) for answer in answers["none"]}) == NUM_ROWS


def _run(model: Path, requests: Path, mode: str) -> list[Any]:
    output, plan = requests.with_name(f"{mode}.jsonl"), requests.with_name(f"{mode}.plan.json")
    settings = PlanSettings(
        model=model,
        pool=mode,  # type: ignore[arg-type]
        replicas=2,
        tensor_parallel=2,
        memory_bytes=64 * MIB,
        max_model_len=256,
    )
    ship_below = ALWAYS if mode == "shipped" else 0
    write_run_plan(plan, plan_here(settings).shipping_below(ship_below))
    files = ("--input", str(requests), "--output", str(output), "--plan", str(plan))
    command = (sys.executable, "-m", "elbowroom", "run", *files)
    subprocess.run(command, check=True, timeout=300)
    report = json.loads(output.with_suffix(".report.json").read_text())
    budget = report["plan"]["budget"]
    num_tokens = budget["kv_bytes"] // budget["kv_bytes_per_token"]
    for replica in report["replicas"]:
        assert replica["num_kv_tokens"] == pytest.approx(num_tokens, rel=0.01)
        assert (replica["pool"]["streamed_iterations"] > 0) == (mode == "streamed")
        assert (replica["pool"]["mapped_bytes"] > 0) == (mode == "mapped")
        assert (replica["pool"]["shipped_rows"] > 0) == (mode == "shipped")
    assert not list(Path("/dev/shm").glob("vllm_dist_*")), "ranks left memory behind"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return [line["response"]["body"]["choices"] for line in lines]
