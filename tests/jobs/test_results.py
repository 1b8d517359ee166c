"""Result lines: out of order in, in input order and whole out, or nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import OutputError
from elbowroom.core.files import write_atomically
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow
from elbowroom.jobs.results import check_paths, error_line, publish, response_line
from elbowroom.jobs.rows import Row
from tests.jobs.plans import write_batch


def umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def job(folder: Path, num_rows: int) -> Iterator[tuple[Journal, BatchFile]]:
    """A journal in ``folder/state`` for a batch of ``num_rows``."""
    (folder / "state").mkdir()
    path = write_batch(folder / "state" / "in.jsonl", num_rows)
    with Journal(folder / "state" / "out") as journal, BatchFile(path) as batch:
        journal.admit({}, batch.scan())
        yield journal, batch


def put(journal: Journal, batch: BatchFile, index: int, failure: str | None = None) -> bytes:
    row = batch.read(index)
    assert isinstance(row, Row)
    line = response_line(row.custom_id, 200, {"n": index})
    journal.put(FinishedRow(index, row.custom_id, row.content_hash, failure, line))
    return line


def test_lines_come_out_in_input_order(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    with job(tmp_path, 5) as (journal, batch):
        lines = {n: put(journal, batch, n, "http_400" if n == 3 else None) for n in (3, 0, 4, 2, 1)}
        journal.commit()
        publish(journal, batch, output, errors)
    assert output.read_bytes() == lines[0] + lines[1] + lines[2] + lines[4]
    assert errors.read_bytes() == lines[3]
    assert names(tmp_path) == ["errors.jsonl", "out.jsonl", "state"]
    assert output.stat().st_mode & 0o777 == errors.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_without_failures_there_is_no_error_file_and_an_old_one_goes(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    output.write_text("of an earlier run")
    errors.write_text("of an earlier run")
    with job(tmp_path, 1) as (journal, batch):
        line = put(journal, batch, 0)
        journal.commit()
        publish(journal, batch, output, errors)
    assert output.read_bytes() == line
    assert not errors.exists()


def test_without_answers_the_output_is_an_empty_file(tmp_path: Path) -> None:
    with job(tmp_path, 1) as (journal, batch):
        line = put(journal, batch, 0, "http_500")
        journal.commit()
        publish(journal, batch, tmp_path / "out", tmp_path / "errors")
    assert (tmp_path / "out").read_bytes() == b""
    assert (tmp_path / "errors").read_bytes() == line


def test_missing_rows_are_named_and_nothing_is_published(tmp_path: Path) -> None:
    with job(tmp_path, 3) as (journal, batch):
        put(journal, batch, 1)
        journal.commit()
        with pytest.raises(OutputError, match=r"of 3 rows: 2 missing \(id-0, id-2\)"):
            publish(journal, batch, tmp_path / "out", tmp_path / "errors")
    assert names(tmp_path) == ["state"]


def test_a_line_under_a_wrong_id_is_not_published(tmp_path: Path) -> None:
    with job(tmp_path, 2) as (journal, batch):
        put(journal, batch, 0)
        line = response_line("id-0", 200, {})
        journal.put(FinishedRow(1, "id-1", 1, None, line))
        journal.commit()
        with pytest.raises(OutputError, match=r"1 missing \(id-1\); 1 more than once \(id-0\)"):
            publish(journal, batch, tmp_path / "out", tmp_path / "errors")
    assert names(tmp_path) == ["state"]


def test_if_one_file_cannot_be_written_neither_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, errors = tmp_path / "out", tmp_path / "errors"
    output.write_text("of an earlier run")
    num_syncs = 0

    def fill_up(_: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        if num_syncs == 2:  # the output fits, the error file does not
            raise OSError(errno.ENOSPC, "No space left on device")

    with job(tmp_path, 2) as (journal, batch):
        put(journal, batch, 0)
        put(journal, batch, 1, "http_400")
        journal.commit()
        monkeypatch.setattr(os, "fsync", fill_up)
        with pytest.raises(OutputError, match=r"errors: No space left on device\. Free some space"):
            publish(journal, batch, output, errors)
        assert num_syncs == 2
        assert output.read_text() == "of an earlier run"
        assert names(tmp_path) == ["out", "state"]
        publish(journal, batch, output, errors)  # once there is room
    assert names(tmp_path) == ["errors", "out", "state"]


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "out", iter([b"x"]))
    assert (tmp_path / "out").read_bytes() == b"x"


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    (tmp_path / "out").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out", interrupted())
    assert (tmp_path / "out").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_response_line_has_the_schema_of_openai() -> None:
    line = response_line("a", 200, {"choices": ["é\n\u2028"]})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    data = json.loads(line)
    assert data == {
        "id": data["id"],
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": data["response"]["request_id"],
            "body": {"choices": ["é\n\u2028"]},
        },
        "error": None,
    }
    assert list(data) == ["id", "custom_id", "response", "error"]


def test_an_error_line_has_no_response() -> None:
    data = json.loads(error_line("a", "invalid_json", "line 1: not valid JSON"))
    assert data["response"] is None
    assert data["error"] == {"code": "invalid_json", "message": "line 1: not valid JSON"}


def test_ids_follow_from_the_custom_id() -> None:
    first, again, other = (json.loads(response_line(name, 200, {})) for name in ("a", "a", "b"))
    assert first["id"].startswith("batch_req_")
    assert first["response"]["request_id"].startswith("req_")
    assert first == again
    assert first["id"] != other["id"]
    assert first["id"] == json.loads(error_line("a", "code", "message"))["id"]


def test_half_a_surrogate_pair_in_an_answer_is_written_as_an_escape() -> None:
    line = response_line("a", 200, {"text": "\ud83d \\ud83d"})
    assert json.loads(line)["response"]["body"] == {"text": "\ud83d \\ud83d"}


def test_good_paths_pass_and_missing_folders_are_made(tmp_path: Path) -> None:
    check_paths([tmp_path / "in"], tmp_path / "a/b/out", tmp_path / "a/err", tmp_path / "c/report")
    assert names(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_is_the_input_is_refused(tmp_path: Path, link: Any) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text("precious")
    link(given, tmp_path / "link")
    for output in (given, tmp_path / "link", tmp_path / "." / "in.jsonl"):
        with pytest.raises(OutputError, match="input and --output are the same file"):
            check_paths([given], output, tmp_path / "errors", tmp_path / "report")
        with pytest.raises(OutputError, match="input and --errors are the same file"):
            check_paths([given], tmp_path / "out", output, tmp_path / "report")
    assert given.read_text() == "precious"


def test_outputs_that_are_one_file_are_refused_before_they_exist(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    one, other = tmp_path / "folder/out", tmp_path / "link/out"
    with pytest.raises(OutputError, match=r"--output and --errors .* give each its own"):
        check_paths([tmp_path / "in"], one, other, tmp_path / "report")
    with pytest.raises(OutputError, match="--errors and --report are the same file"):
        check_paths([tmp_path / "in"], tmp_path / "out", one, other)


def test_outputs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    for output in (tmp_path, Path(os.devnull)):
        with pytest.raises(OutputError, match="is not a regular file: name a file to write"):
            check_paths([tmp_path / "in"], output, tmp_path / "errors", tmp_path / "report")
    with pytest.raises(OutputError, match="choose another folder"):
        check_paths([tmp_path / "in"], tmp_path / "in/out", tmp_path / "e", tmp_path / "r")


def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="is not writable: choose another folder"):
        check_paths([tmp_path / "in"], tmp_path / "out", tmp_path / "errors", tmp_path / "report")


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put a file in the place of a pipe, and of /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is not a regular file"):
        write_atomically(pipe, iter([b"x"]))
    assert pipe.is_fifo()
