"""The same job again: what is kept, tried again, refused, and never replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elbowroom
from elbowroom.core.errors import OutputError
from elbowroom.jobs.journal_reader import journal_folder
from tests.app.stub_command import CASES, Jobs
from tests.jobs.plans import write_batch


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl", "out.report.json"])
def test_what_is_not_ours_is_left_alone(
    jobs: Jobs, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = jobs.folder / name
    foreign.write_text("mine\n")
    assert jobs.run("f02_part1.jsonl") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert foreign.read_text() == "mine\n"
    assert jobs.num_started == 0
    assert jobs.run("f02_part1.jsonl", more=("--overwrite",)) == 0
    assert jobs.run("f02_part1.jsonl") == 0, "now it is ours"
    assert jobs.ids() == ["p1"]


@pytest.mark.parametrize("journal", [b"", b"no database" * 100])
@pytest.mark.parametrize("more", [(), ("--restart",)])
def test_a_journal_that_cannot_be_read_makes_nothing_ours(
    jobs: Jobs, journal: bytes, more: tuple[str, ...]
) -> None:
    folder = journal_folder(jobs.output)
    folder.mkdir()
    (folder / "journal.sqlite").write_bytes(journal)
    names = ("out.jsonl", "out.errors.jsonl", "out.report.json")
    for name in names:
        (jobs.folder / name).write_text("mine\n")
    assert jobs.run("f02_part1.jsonl", more=more) == 2
    assert [(jobs.folder / name).read_text() for name in names] == ["mine\n"] * 3


def test_a_file_that_was_named_and_never_written_is_not_ours(jobs: Jobs) -> None:
    assert jobs.run("f02_part1.jsonl") == 0
    errors = jobs.folder / "out.errors.jsonl"
    errors.write_text("mine\n")
    assert jobs.run("f02_part1.jsonl") == 2
    assert errors.read_text() == "mine\n"


def test_all_files_that_a_job_has_published_stay_its_own(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 10)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    assert jobs.run(path, more=("--errors", str(jobs.folder / "e.jsonl"))) == 3
    assert jobs.run(path) == 3


@pytest.mark.parametrize("is_same", [True, False], ids=["a copy", "another request"])
def test_an_answer_stays_with_the_line_that_has_the_id(jobs: Jobs, is_same: bool) -> None:
    """A line before it that takes its id has the answer only if it says the same."""
    path = write_batch(jobs.folder / "in.jsonl", 2)
    assert jobs.run(path) == 0
    row = json.loads(path.read_text().splitlines()[0])
    if not is_same:
        row["body"]["prompt"] = "something else"
    path.write_text(json.dumps(row, separators=(",", ":")) + "\n" + path.read_text())
    assert jobs.run(path) == (3 if is_same else 2)
    if is_same:
        assert jobs.ids() == ["id-0", "id-1"]
        assert jobs.ids("out.errors.jsonl") == ["line-2"]
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        assert jobs.run(path) == 0


def test_an_answer_is_not_kept_for_another_schema(jobs: Jobs) -> None:
    properties = {"reason": {"type": "string"}, "answer": {"type": "number"}}
    path = write_batch(
        jobs.folder / "in.jsonl", 1, structured_outputs={"json": {"properties": properties}}
    )
    assert jobs.run(path) == 0
    row = json.loads(path.read_text())
    row["body"]["structured_outputs"]["json"]["properties"] = dict(reversed(properties.items()))
    path.write_text(json.dumps(row))
    assert jobs.run(path) == 2


def test_a_job_may_be_moved_with_its_files(jobs: Jobs) -> None:
    assert jobs.run("f02_part1.jsonl") == 0
    for name in ("out.jsonl", "out.report.json", "out.jsonl.elbowroom"):
        (jobs.folder / "moved").mkdir(exist_ok=True)
        (jobs.folder / name).rename(jobs.folder / "moved" / name)
    jobs.output = jobs.folder / "moved" / "out.jsonl"
    assert jobs.run("f02_part1.jsonl", "f02_part2.jsonl") == 0
    assert jobs.ids("moved/out.jsonl") == ["p1", "p2"]


def test_errors_that_are_not_ours_beside_a_job_of_ours(jobs: Jobs) -> None:
    assert jobs.run("f02_part1.jsonl") == 0
    (other := jobs.folder / "e.jsonl").write_text("mine\n")
    assert jobs.run("f02_part1.jsonl", more=("--errors", str(other))) == 2
    assert other.read_text() == "mine\n"


@pytest.mark.parametrize("flag", ["output", "errors", "report", "logs"])
@pytest.mark.parametrize("name", ["-", "s3://bucket/x", "S3://bucket/x", "loop", "off/x"])
def test_outputs_that_are_no_files(
    jobs: Jobs, flag: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jobs.folder)
    Path("loop").symlink_to("loop")
    Path("off").symlink_to("a disk that is not there")
    before = sorted(jobs.folder.iterdir())
    files = {"output": "out.jsonl", flag: name}
    with pytest.raises(OutputError):
        elbowroom.run_batch(jobs.model, CASES / "f02_part1.jsonl", **files)
    assert sorted(jobs.folder.iterdir()) == before


def test_results_that_are_links_are_written_where_these_point(jobs: Jobs) -> None:
    """Whether there is a file yet or not; the job knows them as its own all the same."""
    path = write_batch(jobs.folder / "in.jsonl", 10)
    disk = jobs.folder / "disk"
    disk.mkdir()
    names = ("out.jsonl", "out.errors.jsonl", "out.report.json")
    for name in names:
        (jobs.folder / name).symlink_to(disk / name)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    assert sorted(file.name for file in disk.iterdir()) == sorted(names)
    jobs.stub = []
    assert jobs.run(path, more=("--retry-failed",)) == 0
    assert len(jobs.lines("disk/out.jsonl")) == 10
    assert not (disk / "out.errors.jsonl").exists()
    assert all((jobs.folder / name).is_symlink() for name in names)


def test_failed_rows_are_tried_again(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 40)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    failed = jobs.ids("out.errors.jsonl")
    assert len(failed) == 4
    jobs.stub = []
    capsys.readouterr()
    assert jobs.run(path) == 3
    assert "4 rows have failed: --retry-failed" in capsys.readouterr().err
    assert jobs.run(path, more=("--retry-failed",)) == 0
    assert "4 rows that failed are tried again" in capsys.readouterr().err
    assert jobs.ids() == [f"id-{index}" for index in range(40)]
    assert not (jobs.folder / "out.errors.jsonl").exists()
    report = json.loads((jobs.folder / "out.report.json").read_text())
    assert report["num_resumed"] == 36


def test_the_report_is_of_the_rows_that_there_are(jobs: Jobs) -> None:
    """Lines that were no requests are taken out: nothing is left to run, but much to tell."""
    path = write_batch(jobs.folder / "in.jsonl", 4)
    good = path.read_text()
    path.write_text(f"{good}{{\n")
    assert jobs.run(path) == 3
    path.write_text(good)
    assert jobs.run(path) == 0
    report = jobs.folder / "out.report.json"
    told = json.loads(report.read_text())
    assert (told["num_rows"], told["num_failed"]) == (4, 0)
    before = report.read_bytes()
    assert jobs.run(path) == 0
    assert report.read_bytes() == before, "it has the seconds of the run that answered"


def test_a_row_that_failed_may_be_mended_or_taken_out(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 20)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    failed = jobs.ids("out.errors.jsonl")
    assert len(failed) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["custom_id"] != failed[0]]
    for row in rows:
        if row["custom_id"] == failed[1]:
            row["body"]["prompt"] = "mended"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    jobs.stub = ["--log", str(jobs.folder / "answered")]
    assert jobs.run(path) == 0
    assert jobs.ids() == [row["custom_id"] for row in rows]
    assert len((jobs.folder / "answered").read_text().split()) == 1


def test_what_failed_by_a_flag_is_tried_again_with_another(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 40)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    jobs.stub = []
    assert jobs.run(path, more=("--served-model-name", "other")) == 0
    assert len(jobs.ids()) == 40


def test_another_job_may_follow_one_without_answers(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 4)
    jobs.stub = ["--refuses", "1"]
    assert jobs.run(path) == 3
    jobs.stub = []
    assert jobs.run(path, more=("--seed", "1")) == 0
    assert jobs.run(path, more=("--seed", "2")) == 2, "these have answers"


def rewritten(path: Path, write: Callable[[Any], str]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{write(row)}\n" for row in rows))


@pytest.mark.parametrize(
    "write",
    [
        lambda row: json.dumps(row, separators=(",", ":")),
        lambda row: json.dumps(row, sort_keys=True, indent=None),
        lambda row: json.dumps({**row, "body": {**row["body"], "max_tokens": 8.0}}),
        lambda row: json.dumps(dict(reversed(row.items()))),
    ],
    ids=["compact", "sorted", "floats", "reversed"],
)
def test_an_input_that_is_written_anew_is_the_same(jobs: Jobs, write: Callable[[Any], str]) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 20)
    assert jobs.run(path) == 0
    rewritten(path, write)
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[0].replace("id-0", "new") + "\n")
    jobs.stub = ["--log", str(jobs.folder / "answered")]
    assert jobs.run(path) == 0
    assert (jobs.folder / "answered").read_text().split() == ["20"]
    assert jobs.ids() == [*(f"id-{index}" for index in range(20)), "new"]
    assert jobs.run(path) == 0, "and again, by its new bytes"


def test_a_changed_request_is_refused(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 4)
    assert jobs.run(path) == 0
    rewritten(path, lambda row: json.dumps({**row, "body": {**row["body"], "max_tokens": 9}}))
    assert jobs.run(path) == 2


def test_results_may_be_read_by_whom_the_umask_says(jobs: Jobs) -> None:
    before = os.umask(0o027)
    try:
        assert jobs.run("f02_part1.jsonl") == 0
    finally:
        os.umask(before)
    assert jobs.output.stat().st_mode & 0o777 == 0o640
    assert journal_folder(jobs.output).stat().st_mode & 0o777 == 0o700
