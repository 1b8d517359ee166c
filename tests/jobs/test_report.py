"""What is left of a run."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from elbowroom.core.errors import OutputError
from elbowroom.core.units import GIB, MIB
from elbowroom.jobs.report import JobReport, ReplicaReport, print_summary
from elbowroom.plans.pool import (
    EngineOptions,
    Layout,
    MemoryBudget,
    PoolShare,
    Prediction,
    RunPlan,
)
from elbowroom.pool.stats import PoolStats

PLAN = RunPlan(
    model_dir="models/tiny",
    budget=MemoryBudget(
        memory_bytes=2 * GIB,
        replicated_bytes=100 * MIB,
        ffn_bytes=50 * MIB,
        slot_bytes=10 * MIB,
        workspace_bytes=MIB,
        kv_bytes=1600 * 64,
        kv_bytes_per_token=64,
        block_tokens=16,
    ),
    shares=tuple(PoolShare("mapped", rank, 2, owners=(0, 1)) for rank in range(2)),
    cores=((0,), (1,)),
    engine=EngineOptions("float32", 512, 8, 256, ("tiny",)),
    layout=Layout(1, 2, 1, "mapped"),
    prediction=Prediction("a", 10, 500, 480, 40.0, 34.0, 46.0),
)
REPLICA = ReplicaReport(
    replica=0,
    num_kv_tokens=1600,
    resident_bytes=150 * MIB,
    start_seconds=4.0,
    num_restarts=1,
    num_preemptions=2,
    prefix_query_tokens=200,
    prefix_hit_tokens=50,
    pool=PoolStats(
        mapped_bytes=3 * MIB,
        streamed_bytes=7 * MIB,
        streamed_iterations=5,
        shipped_iterations=3,
        shipped_rows=23,
        wait_seconds=0.25,
    ),
)
REPORT = JobReport(
    plan=PLAN,
    num_rows=10,
    num_succeeded=7,
    num_resumed=2,
    failures={"invalid_json": 2, "http_400": 1},
    prompt_tokens=500,
    output_tokens=400,
    run_prompt_tokens=350,
    run_output_tokens=300,
    start_seconds=12.5,
    run_seconds=20.0,
    replicas=(REPLICA, replace(REPLICA, replica=1, num_kv_tokens=1584)),
    prediction_for_actual=Prediction("a", 10, 500, 400, 40.0, 34.0, 46.0),
)


def summary_of(report: JobReport) -> list[str]:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=200), report)
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_rows_add_up_and_speed_leaves_start_up_out() -> None:
    assert REPORT.num_failed == 3
    assert REPORT.num_succeeded + REPORT.num_failed == REPORT.num_rows
    assert REPORT.tokens_per_second("output") == 15.0


def test_a_job_without_run_time_has_no_speed() -> None:
    assert replace(REPORT, run_seconds=0.0).tokens_per_second("output") == 0.0


def test_the_file_holds_everything_and_its_plan_can_run_again(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    REPORT.write(path)
    data = json.loads(path.read_text())
    assert RunPlan.from_json(data["plan"]) == PLAN
    assert data["failures"] == {"invalid_json": 2, "http_400": 1}
    assert (data["num_rows"], data["num_succeeded"], data["num_failed"]) == (10, 7, 3)
    assert (data["start_seconds"], data["run_seconds"]) == (12.5, 20.0)
    assert data["output_tokens_per_second"] == 15.0
    assert [
        ReplicaReport(**{**replica, "pool": PoolStats(**replica["pool"])})
        for replica in data["replicas"]
    ] == list(REPORT.replicas)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*report\.json: No such file"):
        REPORT.write(tmp_path / "gone" / "report.json")


def test_the_summary_names_what_a_user_asks_for() -> None:
    assert summary_of(REPORT) == [
        "Report",
        "rows 7 of 10 answered (2 finished before this run); failed: 1 http_400, 2 invalid_json",
        "tokens 500 prompt, 400 output",
        "seconds 12.5 start-up, 20.0 run",
        "output tokens/s 15.0",
        "predicted 12.0 output tokens/s, 40.0 s (34.0 to 46.0) for 480 output tokens",
        "predicted for actual tokens 10.0 output tokens/s, 40.0 s (34.0 to 46.0) (outcome 1.50x)",
        "KV tokens per replica 1600, 1584 (planned: 1600)",
        "weights and slots held 150 MiB, 150 MiB (planned: 160 MiB)",
        "preemptions 4",
        "restarts 2",
        "prompt tokens in the prefix cache 100 of 400 (25%)",
        "weights mapped, streamed 6 MiB, 14 MiB",
        "iterations streamed, shipped 10, 6 with 46 rows",
        "seconds compute waited 0.5",
    ]


def test_the_summary_of_a_good_run_does_not_speak_of_failures() -> None:
    lines = summary_of(replace(REPORT, num_succeeded=10, num_resumed=0, failures={}))
    assert lines[1] == "rows 10 of 10 answered"


def test_speed_of_a_job_that_generates_nothing_is_that_of_its_prompts() -> None:
    """Embeddings have no output tokens; their prediction has none, either."""
    prediction = Prediction("a", 10, 500, 0, 40.0, 34.0, 46.0)
    report = replace(
        REPORT,
        plan=replace(PLAN, prediction=prediction),
        output_tokens=0,
        run_output_tokens=0,
        prediction_for_actual=prediction,
    )
    assert summary_of(report)[4:7] == [
        "prompt tokens/s 17.5",
        "predicted 12.5 prompt tokens/s, 40.0 s (34.0 to 46.0) for 500 prompt tokens",
        "predicted for actual tokens 12.5 prompt tokens/s, 40.0 s (34.0 to 46.0) (outcome 1.40x)",
    ]
    assert report.to_json()["prompt_tokens_per_second"] == 17.5
    failed = replace(report, prompt_tokens=0, run_prompt_tokens=0)
    assert summary_of(failed)[4] == "output tokens/s 0.0"
