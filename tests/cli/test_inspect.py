"""The commands that look at a job: status, results, verify."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from elbowroom.cli.main import main
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.results import publish, response_line
from elbowroom.jobs.rows import Row
from tests.jobs.plans import write_batch


class FinishedJob:
    """A finished job of three rows, one of which failed, without an engine."""

    def __init__(self, folder: Path) -> None:
        self.input = write_batch(folder / "in.jsonl", 3)
        self.output = folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        with Journal(self.output) as journal, BatchFile(self.input) as batch:
            journal.admit({}, batch.scan())
            for row in batch.rows():
                assert isinstance(row, Row)
                failure = "http_400" if row.index == 1 else None
                line = response_line(row.custom_id, 400 if failure else 200, {})
                journal.put(
                    FinishedRow(row.index, row.custom_id, row.content_hash, failure, line, 4, 2)
                )
            journal.commit()
            publish(journal, batch, self.output, self.errors)


@pytest.fixture
def finished_job(tmp_path: Path) -> FinishedJob:
    return FinishedJob(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "nope is not a directory"),
        ("a-file", "a-file is not a directory"),
        ("a-folder", "config.json: No such file"),
    ],
)
def test_what_is_no_model(
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told as by run, and not as by the library that looks for a tokenizer."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("a-folder").mkdir()
    path = write_batch(tmp_path / "in.jsonl", 2)
    assert main(["check", str(path), "--model", name]) == 2
    assert words in capsys.readouterr().err


def test_status(finished_job: FinishedJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished_job.output)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "state finished rows 3 of 3 finished; failed: 1 http_400" in shown
    assert main(["status", str(finished_job.output), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["num_finished"], status["output_tokens"]) == ("finished", 3, 6)


def test_the_folder_stands_for_its_output(
    finished_job: FinishedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is what a shell offers to complete."""
    assert main(["status", f"{finished_job.output}.elbowroom", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert main(["status", str(finished_job.output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_status_of_a_job_that_goes_on(
    finished_job: FinishedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    write_batch(finished_job.input, 10)
    with Journal(finished_job.output) as journal, BatchFile(finished_job.input) as batch:
        journal.admit({}, batch.scan())
        facts = {"num_resumed": 1, "resumed_output_tokens": 2, "num_replicas": 2}
        journal.note(pid=7, started_at=time.time() - 20, ready_at=time.time() - 10, **facts)
        assert main(["status", str(finished_job.output), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["state"], status["pid"], status["num_rows"]) == ("running", 7, 10)
        assert status["elapsed_seconds"] == pytest.approx(20, abs=2)
        assert status["output_tokens_per_second"] == pytest.approx(0.4, rel=0.2)
        assert status["seconds_left"] == pytest.approx(35, rel=0.2)
        assert main(["status", str(finished_job.output)]) == 0
        assert "running (process 7)" in capsys.readouterr().out
    assert main(["status", str(finished_job.output)]) == 0
    assert "run the same command again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "ids"),
    [("all", ["id-0", "id-1", "id-2"]), ("succeeded", ["id-0", "id-2"]), ("failed", ["id-1"])],
)
def test_results(
    finished_job: FinishedJob, capfdbinary: pytest.CaptureFixture[bytes], rows: str, ids: list[str]
) -> None:
    assert main(["results", str(finished_job.output), "--rows", rows]) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ids


def test_verify(finished_job: FinishedJob, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(finished_job.input), str(finished_job.output)]
    assert main(["verify", *files]) == 0
    assert "each of 3 rows has exactly one result" in capsys.readouterr().out
    finished_job.errors.unlink()
    assert main(["verify", *files, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["missing"] == ["id-1"]
    assert main(["verify", *files, "--errors", str(finished_job.errors)]) == 2


@pytest.mark.parametrize("command", ["status", "results"])
def test_commands_on_what_is_no_job(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "out.jsonl")]) == 2
    assert "name the --output of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
