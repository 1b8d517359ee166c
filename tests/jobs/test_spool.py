"""Result lines: out of order in, in input order and whole out, or nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import OutputError
from elbowroom.jobs.spool import (
    Spool,
    check_paths,
    error_line,
    response_line,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lines_come_out_in_input_order(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    with Spool(tmp_path, 5) as spool:
        for index in (3, 0, 4, 2, 1):
            spool.put(index, f"row {index}\n".encode(), is_success=index != 3)
        assert (spool.num_succeeded, spool.num_failed) == (4, 1)
        assert names(tmp_path) == []  # unnamed until published
        spool.publish(output, errors)
    assert output.read_text() == "row 0\nrow 1\nrow 2\nrow 4\n"
    assert errors.read_text() == "row 3\n"
    assert names(tmp_path) == ["errors.jsonl", "out.jsonl"]
    assert output.stat().st_mode & 0o777 == 0o600


def test_without_failures_there_is_no_error_file_and_an_old_one_goes(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    output.write_text("of an earlier run")
    errors.write_text("of an earlier run")
    with Spool(tmp_path, 1) as spool:
        spool.put(0, b"new\n", is_success=True)
        spool.publish(output, errors)
    assert output.read_text() == "new\n"
    assert not errors.exists()


def test_without_answers_the_output_is_an_empty_file(tmp_path: Path) -> None:
    with Spool(tmp_path, 1) as spool:
        spool.put(0, b"bad\n", is_success=False)
        spool.publish(tmp_path / "out", tmp_path / "errors")
    assert (tmp_path / "out").read_bytes() == b""
    assert (tmp_path / "errors").read_bytes() == b"bad\n"


def test_a_row_is_answered_once(tmp_path: Path) -> None:
    with Spool(tmp_path, 2) as spool:
        spool.put(1, b"first\n", is_success=True)
        with pytest.raises(OutputError, match="row 1 was answered twice"):
            spool.put(1, b"second\n", is_success=False)
        assert (spool.num_succeeded, spool.num_failed) == (1, 0)


def test_missing_rows_are_counted_and_nothing_is_published(tmp_path: Path) -> None:
    with Spool(tmp_path, 3) as spool:
        spool.put(1, b"only\n", is_success=True)
        with pytest.raises(OutputError, match="2 of 3 rows have no result"):
            spool.publish(tmp_path / "out", tmp_path / "errors")
    assert names(tmp_path) == []


def test_large_lines_survive(tmp_path: Path) -> None:
    lines = [bytes([65 + at]) * 1_000_000 + b"\n" for at in range(3)]
    with Spool(tmp_path, 3) as spool:
        for index in (2, 0, 1):
            spool.put(index, lines[index], is_success=True)
        spool.publish(tmp_path / "out", tmp_path / "errors")
    assert (tmp_path / "out").read_bytes() == b"".join(lines)


FILL_DISK = """
import resource, signal, sys
from pathlib import Path
from elbowroom.core.errors import OutputError
from elbowroom.jobs.spool import Spool, write_atomically

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
folder = Path(sys.argv[1])
try:
    with Spool(folder, 3) as spool:
        spool.put(0, b"a" * 4_000 + b"\\n", True)
        spool.put(1, b"b" * int(sys.argv[2]) + b"\\n", True)
except OutputError as error:
    print(error)
try:
    write_atomically(folder / "out", iter([b"c" * 6_000] * 2))
except OutputError as error:
    print(error)
"""

MAKE_ROOM = """
try:
    spool = Spool(folder, 2).__enter__()
    spool.put(0, b"a" * 4_000 + b"\\n", True)
    spool.put(1, b"b" * 70_000 + b"\\n", True)
except OutputError:
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    spool.put(1, b"again\\n", True)
    spool.publish(folder / "out", folder / "errors")
"""


@pytest.mark.parametrize("num_bytes", [7_000, 70_000])  # within and beyond Python's own buffer
def test_a_full_disk_is_explained_and_leaves_no_file(tmp_path: Path, num_bytes: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FILL_DISK, str(tmp_path), str(num_bytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    put, write = result.stdout.splitlines()
    assert put.startswith(
        f"cannot write {num_bytes + 4_002} bytes to a temporary file in {tmp_path}"
    )
    assert write.startswith(f"cannot write {tmp_path / 'out'}: File too large. Free some space")
    assert result.stderr == ""
    assert names(tmp_path) == []


def test_once_there_is_room_the_line_can_be_put_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL_DISK + MAKE_ROOM, str(tmp_path), "7000"]
    subprocess.run(command, capture_output=True, check=True)
    assert (tmp_path / "out").read_bytes() == b"a" * 4_000 + b"\nagain\n"


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

    monkeypatch.setattr(os, "fsync", fill_up)
    with Spool(tmp_path, 2) as spool:
        spool.put(0, b"good\n", is_success=True)
        spool.put(1, b"bad\n", is_success=False)
        with pytest.raises(OutputError, match=r"errors: No space left on device\. Free some space"):
            spool.publish(output, errors)
    assert num_syncs == 2
    assert output.read_text() == "of an earlier run"
    assert names(tmp_path) == ["out"]


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


def test_a_spool_in_a_folder_that_is_gone_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="cannot write a temporary file in"),
        Spool(tmp_path / "gone", 1),
    ):
        pass


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
    check_paths(tmp_path / "in", tmp_path / "a/b/out", tmp_path / "a/err", tmp_path / "c/report")
    assert names(tmp_path) == ["a", "c"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_is_the_input_is_refused(tmp_path: Path, link: Any) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text("precious")
    link(given, tmp_path / "link")
    for output in (given, tmp_path / "link", tmp_path / "." / "in.jsonl"):
        with pytest.raises(OutputError, match="input and --output are the same file"):
            check_paths(given, output, tmp_path / "errors", tmp_path / "report")
        with pytest.raises(OutputError, match="input and --errors are the same file"):
            check_paths(given, tmp_path / "out", output, tmp_path / "report")
    assert given.read_text() == "precious"


def test_outputs_that_are_one_file_are_refused_before_they_exist(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    one, other = tmp_path / "folder/out", tmp_path / "link/out"
    with pytest.raises(OutputError, match=r"--output and --errors .* give each its own"):
        check_paths(tmp_path / "in", one, other, tmp_path / "report")
    with pytest.raises(OutputError, match="--errors and --report are the same file"):
        check_paths(tmp_path / "in", tmp_path / "out", one, other)


def test_outputs_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("")
    for output in (tmp_path, Path(os.devnull)):
        with pytest.raises(OutputError, match="is not a regular file: name a file to write"):
            check_paths(tmp_path / "in", output, tmp_path / "errors", tmp_path / "report")
    with pytest.raises(OutputError, match="choose another folder"):
        check_paths(tmp_path / "in", tmp_path / "in/out", tmp_path / "e", tmp_path / "r")


def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="is not writable: choose another folder"):
        check_paths(tmp_path / "in", tmp_path / "out", tmp_path / "errors", tmp_path / "report")
