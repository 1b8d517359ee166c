"""Batch jobs from Python, with stub replicas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import elbowroom
from elbowroom.core.errors import InputError, MemoryPlanError, ReplicaError
from elbowroom.jobs.job import Job
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"memory": "64MiB", "max_num_batched_tokens": 64, "max_num_seqs": 4}


class Files:
    """A model, a batch file of 40 rows, and where its results go."""

    def __init__(self, folder: Path) -> None:
        write_model(folder / "model")
        self.all = (folder / "model", write_batch(folder / "in.jsonl", 40), folder / "out.jsonl")
        self.output = self.all[2]
        self.stub: list[str] = []


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files(tmp_path)

    async def run_with_stub(job: Job) -> JobReport:
        command = [sys.executable, "-m", "tests.jobs.stub_replica", *files.stub]
        return await run_job(job, command)

    monkeypatch.setattr("elbowroom.app.batch.run_job", run_with_stub)
    monkeypatch.chdir(ROOT)
    return files


def test_run_batch(files: Files, capfd: pytest.CaptureFixture[str]) -> None:
    report = elbowroom.run_batch(*files.all, replicas=2, **SMALL)
    assert (report.num_succeeded, len(report.replicas)) == (40, 2)
    assert len(files.output.read_text().splitlines()) == 40
    assert report.plan.prediction is not None
    assert report.plan.prediction.num_rows == 40
    assert report.prediction_for_actual is not None
    assert report.prediction_for_actual.output_tokens == pytest.approx(
        report.output_tokens, rel=0.3
    )
    assert capfd.readouterr() == ("", "")


def test_options_may_be_none_and_paths_texts(files: Files, tmp_path: Path) -> None:
    """Also those that are no flags of their own on the command line."""
    unset: dict[str, Any] = {"errors": None, "report": None, "logs": None, "calibrate": None}
    report = elbowroom.run_batch(
        *files.all, **unset, vllm_options=["--x", "1"], cluster="this-machine", **SMALL
    )
    assert report.plan.engine.extra == ("--x", "1")
    written = tmp_path / "out.report.json"
    elbowroom.run_batch(
        *files.all[:2], tmp_path / "o", calibrate=str(written), logs=str(tmp_path), **SMALL
    )
    assert (tmp_path / "replica-0.log").exists()
    again = elbowroom.run_batch(*files.all, given_plan=report.plan, vllm_options=[])
    assert again.num_resumed == 40


def test_embeddings_are_predicted_by_their_prompts(files: Files) -> None:
    text = files.all[1].read_text().replace("/v1/completions", "/v1/embeddings")
    files.all[1].write_text(text.replace('"prompt"', '"input"'))
    report = elbowroom.run_batch(*files.all, **SMALL)
    told = report.plan.prediction
    assert told is not None
    assert (told.output_tokens, told.rated_by) == (0, "prompt")
    assert told.tokens_per_second == pytest.approx(told.prompt_tokens / told.seconds)


def test_iter_batch_gives_rows_as_they_finish_and_publishes(files: Files) -> None:
    ids = [line["custom_id"] for line in elbowroom.iter_batch(*files.all, **SMALL)]
    assert sorted(ids) == sorted(f"id-{index}" for index in range(40))
    assert len(files.output.read_text().splitlines()) == 40
    assert list(elbowroom.iter_batch(*files.all, **SMALL)) == [], "all are finished"


def test_a_loop_that_is_left_stops_the_job_and_the_next_goes_on(files: Files) -> None:
    files.stub = ["--latency", "0.3"]
    seen = []
    for line in elbowroom.iter_batch(*files.all, **SMALL):
        seen.append(line["custom_id"])
        break
    assert not files.output.exists()
    files.stub = []
    rest = [line["custom_id"] for line in elbowroom.iter_batch(*files.all, **SMALL)]
    assert not set(seen) & set(rest)
    assert len(files.output.read_text().splitlines()) == 40


def test_what_fails_is_raised(files: Files, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        elbowroom.run_batch(files.all[0], tmp_path / "none", files.output, **SMALL)
    with pytest.raises(MemoryPlanError):
        elbowroom.run_batch(*files.all, memory="1KiB")
    with pytest.raises(TypeError, match="no_such"):
        elbowroom.run_batch(*files.all, no_such=1)
    with pytest.raises(InputError, match="list of words"):
        elbowroom.run_batch(*files.all, vllm_options="--runner pooling")
    files.stub = ["--fails", "no memory"]
    with pytest.raises(ReplicaError, match="no memory"):
        list(elbowroom.iter_batch(*files.all, **SMALL))


def test_the_package_offers_nothing_else() -> None:
    assert not hasattr(elbowroom, "run_everything")
