"""From files to plans and back: `plan`, `simulate` and `run --plan`, and what each refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tools.make_model import make_model

from elbowroom.app.plan import read_run_plan
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError
from elbowroom.jobs.job import Job
from elbowroom.jobs.lengths import ASSUMED_OUTPUT_TOKENS
from elbowroom.jobs.rows import Row
from elbowroom.plans.pool import RunPlan
from tests.jobs.plans import lengths_of, write_batch
from tests.planning.facts import CONFIGS, CPU, MODELS

QWEN = str(MODELS / "Qwen3-32B")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "small", "llama", 4)


def plan(*flags: str) -> int:
    return main(["plan", *flags])


def test_plan_prints_every_layout_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", "4096:512x2000", "--cluster", "h20-8", "--memory", "86.4GB", "--explain")
    assert plan("--model", str(MODELS / "Llama-3.1-70B"), *flags) == 0
    out = capsys.readouterr().out
    assert "2000 rows, 8192000 prompt and 1024000 output tokens" in out
    for words in ("t8d1 none", "t2d4 shipped 2 slots", "+-35%", "KV tokens", "B_th", "fetch"):
        assert words in out
    assert "t1d1g8 none" in out
    assert "lacks" in next(line for line in out.splitlines() if "t1d1g8 none" in line)
    assert "as fast as" in out
    assert "data sheet" in out, "explained terms name their sources"


def test_an_impossible_request_gets_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", "1024:512x100", "--cluster", "h20-8", "--tensor-parallel", "1")
    assert plan("--model", str(MODELS / "Llama-3.1-70B"), *flags, "--pool", "none") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "more memory per device, for t1d1g8 none" in said
    assert "another layout:" in said
    assert "--weight-dtype fp8: t1d1g8 none fits" in said


def test_a_plan_is_simulated_and_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trace = tmp_path / "plan.json", tmp_path / "t.json"
    flags = ("--lengths", "4096:512x500", "--cluster", "h20-8", "--pool", "shipped")
    assert plan("--model", QWEN, *flags, "--json", str(path)) == 0
    command = ["simulate", "--plan", str(path), "--cluster", "h20-8", "--trace", str(trace)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("compute waited") == 2, "of the usual batch, streamed, and of one row, shipped"
    assert "iteration, batch 1, shipped" in out
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    iterations = "iteration, batch 1, shipped, replica 0"
    assert {"replica 0", iterations, "compute", "ship to 1", "copies 0"} <= names


def test_simulate_agrees_with_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    flags = ("--lengths", "1024:512x4000", "--cluster", "h200-8")
    assert plan("--model", QWEN, *flags, "--json", str(path)) == 0
    prediction = RunPlan.from_json(json.loads(path.read_text())).prediction
    assert prediction is not None
    capsys.readouterr()
    assert main(["simulate", "--plan", str(path)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("seconds"))
    assert float(line.split()[-1]) == pytest.approx(prediction.seconds, rel=0.1)


def test_run_takes_a_plan(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, path = write_batch(tmp_path / "in.jsonl", 5), tmp_path / "plan.json"
    flags = ["--model", str(small), "--input", str(batch), "--memory", "64MiB", "--replicas", "2"]
    assert plan(*flags, "--pool", "mapped", "--seed", "3", "--json", str(path)) == 0
    seen: list[RunPlan] = []

    async def run_job(job: Job) -> None:
        seen.append(job.plan)
        raise InputError("seen")

    monkeypatch.setattr("elbowroom.app.batch.run_job", run_job)
    files = ["--input", str(batch), "--output", str(tmp_path / "out.jsonl")]
    assert main(["run", "--plan", str(path), *files]) == 2
    by_plan = seen.pop()
    assert by_plan.layout == read_run_plan(path).layout
    assert by_plan.budget == read_run_plan(path).budget
    assert by_plan.prediction is not None
    by_flags = ["--model", str(small), "--memory", "64MiB", "--replicas", "2", "--pool", "mapped"]
    assert main(["run", *by_flags, "--seed", "3", *files]) == 2
    assert seen.pop() == by_plan, "plan and run decide alike"
    capsys.readouterr()
    other = write_batch(tmp_path / "other.jsonl", 3)
    files[1] = str(other)
    assert main(["run", "--plan", str(path), *files]) == 2
    assert f"made for {batch}, and is now run for {other}" in capsys.readouterr().err
    assert main(["run", "--plan", str(path), *files, "--replicas", "3"]) == 2
    assert "--replicas is what the plan says" in " ".join(capsys.readouterr().err.split())
    assert main(["run", *files]) == 2
    assert "give --model" in capsys.readouterr().err


def test_a_plan_of_several_pools_cannot_be_run_yet(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    job = ("--lengths", "1024:512x100", "--cluster", "h200-8", "--json", str(path))
    assert plan("--model", QWEN, *job, "--pool", "streamed", "--tensor-parallel", "1") == 0
    data = json.loads(path.read_text())
    data["layout"] |= {"num_ranks": 2, "num_groups": 4}
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="several groups"):
        read_run_plan(path)


def test_a_plan_for_a_file_s_cluster_is_simulated_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, cluster = tmp_path / "plan.json", tmp_path / "mine.toml"
    cluster.write_text(replace(CPU, name="mine").to_toml())
    flags = ("--lengths", "64:64x10", "--cluster", str(cluster), "--json", str(path))
    assert plan("--model", str(MODELS / "Llama-3.1-8B"), *flags, "--memory", "20GB") == 0
    assert main(["simulate", "--plan", str(path)]) == 2
    assert "'mine' of a file: give it as --cluster" in " ".join(capsys.readouterr().err.split())
    assert main(["simulate", "--plan", str(path), "--cluster", str(cluster)]) == 0


def test_what_if_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--lengths", "1024:512x100", "--cluster", "h200-8", "--weight-dtype", "fp8")
    assert plan("--model", QWEN, *job) == 0
    assert plan("--model", QWEN, *job, "--json", str(tmp_path / "plan.json")) == 2
    assert "--weight-dtype asks what if" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_any_number_of_slots_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--lengths", "1024:512x100", "--cluster", "h200-8")
    assert plan("--model", QWEN, *job, "--pool", "streamed", "--slots", "5") == 0
    assert "t1d8 streamed 5 slots" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{}", "[]", '{"layout": {}}', "nonsense"])
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match="plan"):
        read_run_plan(path)


def test_an_unknown_model_type_is_planned_from_its_shapes(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((small / "config.json").read_text()) | {"model_type": "novel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(small / "model.safetensors")
    flags = ("--lengths", "64:32x100", "--memory", "64MiB", "--replicas", "2")
    assert plan("--model", str(tmp_path), *flags) == 0
    assert "'novel' is not known: planned from its shapes alone" in capsys.readouterr().out


def test_lengths_of_a_file(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    rows = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w5 w6 w7"}]}),
        ("/v1/completions", {"prompt": [1, 2, 3, 4], "max_tokens": 7, "n": 3}),
        ("/v1/completions", {"prompt": "w5 w6"}),
        ("/v1/embeddings", {"input": "w5"}),
    ]
    lines = [
        json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": {"model": "m", **b}})
        for i, (url, b) in enumerate(rows)
    ]
    path.write_text("\n".join([*lines, "not json"]) + "\n")
    lengths = lengths_of(path, small)
    assert lengths.workload.prompt_tokens.tolist() == [3 + 5 + 3, 4, 4, 4, 2, 1]
    assert lengths.workload.output_tokens.tolist() == [ASSUMED_OUTPUT_TOKENS, 7, 7, 7, 16, 1]
    assert lengths.num_unlimited == 1
    assert "without max_tokens" in str(lengths)
    num_bytes = sum(Row(0, 1, "", url, body, 0).prompt_bytes for url, body in rows)
    assert lengths.bytes_per_token == num_bytes / (11 + 4 + 2 + 1)


def test_a_long_file_is_sampled(small: Path, tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", 100)
    whole = lengths_of(path, small).workload
    sampled = lengths_of(path, small, max_rows=10)
    assert sampled.num_counted == 10
    assert sampled.workload.num_rows == whole.num_rows == 100
    assert sampled.workload.num_prompt_tokens == pytest.approx(whole.num_prompt_tokens, rel=0.2)


def test_a_file_without_rows(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("no row\n")
    with pytest.raises(InputError, match="no row that could be answered"):
        lengths_of(path, small)


def test_more_memory_than_a_device_has(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--lengths", "512:64x100", "--cluster", "h20-8", "--memory", "200GB")
    assert plan("--model", str(MODELS / "Llama-3.1-8B"), *flags) == 2
    assert "which has 95.58 GiB: lower it" in capsys.readouterr().err


def test_layouts_that_are_not_run_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts of a mixture may be divided, and a pipeline goes over two nodes."""
    shutil.copy(CONFIGS / "deepseek-v3.json", tmp_path / "config.json")
    flags = ("--model", str(tmp_path), "--lengths", "1000:1000x2000")
    path = tmp_path / "plan.json"
    assert plan(*flags, "--cluster", "h200-8", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert re.search(r">\*t\dd\d experts divided", out)
    assert "not run by this version; the best that it runs: t8d1 none" in out
    with pytest.raises(InputError, match="experts divided among replicas"):
        read_run_plan(path)
    assert plan(*flags, "--cluster", "h100-2x8") == 0
    assert ">*t8p2d1 none" in capsys.readouterr().out
