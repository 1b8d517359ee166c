"""The spool: results come out whole, in input order, once, or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from elbowroom.core.errors import OutputError
from elbowroom.jobs import spool as spool_module
from elbowroom.jobs.spool import Spool, check_paths, error_line, response_line, write_atomically

IS_ROOT = os.geteuid() == 0


def _ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def _put(spool: Spool, index: int, status: int = 200) -> None:
    line = response_line(f"id-{index}", status, {"text": f"é\n{index}"})
    spool.put(index, line, is_success=status == 200)


def test_input_order_whatever_the_order_of_answers(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    with Spool(tmp_path, 6) as spool:
        for index in (4, 0, 5, 2, 3, 1):
            _put(spool, index, 400 if index in (1, 4) else 200)
        assert (spool.num_succeeded, spool.num_failed) == (4, 2)
        spool.publish(output, errors)
    assert _ids(output) == ["id-0", "id-2", "id-3", "id-5"]
    assert _ids(errors) == ["id-1", "id-4"]
    assert sorted(tmp_path.iterdir()) == [errors, output], "the spool left something"


def test_without_failures_a_stale_error_file_is_removed(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    errors.write_text("of the last run")
    with Spool(tmp_path, 1) as spool:
        _put(spool, 0)
        spool.publish(output, errors)
    assert list(tmp_path.iterdir()) == [output]


def test_all_rows_failed(tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    with Spool(tmp_path, 1) as spool:
        _put(spool, 0, 500)
        spool.publish(output, errors)
    assert output.read_bytes() == b""
    assert _ids(errors) == ["id-0"]


def test_a_second_answer_is_refused(tmp_path: Path) -> None:
    with Spool(tmp_path, 2) as spool:
        _put(spool, 0)
        with pytest.raises(OutputError, match="row 0 was answered twice"):
            _put(spool, 0)


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    with Spool(tmp_path, 3) as spool:
        _put(spool, 1)
        with pytest.raises(OutputError, match="2 of 3 rows have no result"):
            spool.publish(tmp_path / "out.jsonl", tmp_path / "err.jsonl")
    assert not list(tmp_path.iterdir())


def test_results_are_private(tmp_path: Path) -> None:
    old = tmp_path / "out.jsonl"
    old.write_text("old")
    old.chmod(0o644)
    write_atomically(old, iter([b"new"]))
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert old.read_bytes() == b"new"


def _no_space(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out.jsonl"
    old.write_text("old")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OutputError, match=r"cannot write .*No space left.*free some space"):
        write_atomically(old, iter([b"new"]))
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old], "half a file was left"


def test_a_disk_that_fills_up_shows_with_the_row(tmp_path: Path) -> None:
    with Spool(tmp_path, 2) as spool:
        _put(spool, 0)
        real, spool._file = spool._file, _FullFile()  # type: ignore[assignment]
        with pytest.raises(OutputError, match="No space left"):
            _put(spool, 1)
        spool._file = real
        assert spool.num_succeeded == 1
        with pytest.raises(OutputError, match="1 of 2 rows have no result"):
            spool.publish(tmp_path / "out.jsonl", tmp_path / "err.jsonl")


class _FullFile:
    def seek(self, _: int) -> None: ...

    write = _no_space


def test_either_both_files_are_published_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the second file is written."""
    output, errors = tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    output.write_text("old")
    fsync, num_calls = os.fsync, 0

    def fsync_until_full(descriptor: int) -> None:
        nonlocal num_calls
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            num_calls += 1
            if num_calls == 2:
                _no_space()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_until_full)
    with Spool(tmp_path, 2) as spool:
        _put(spool, 0)
        _put(spool, 1, 400)
        with pytest.raises(OutputError, match="Nothing was published"):
            spool.publish(output, errors)
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_a_broken_writer_leaves_nothing(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out.jsonl", parts())
    assert not list(tmp_path.iterdir())


def test_lines_follow_the_schema_of_the_batch_api() -> None:
    line = json.loads(response_line("ä", 404, {"error": {"message": "no"}}))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["custom_id"] == "ä"
    assert line["error"] is None
    assert line["response"]["status_code"] == 404
    assert line["response"]["body"] == {"error": {"message": "no"}}
    assert line["id"].startswith("batch_req_")
    assert line["response"]["request_id"].startswith("req_")
    rejected: dict[str, Any] = json.loads(error_line("b", "invalid_json", "line 3: no"))
    assert rejected["response"] is None
    assert rejected["error"] == {"code": "invalid_json", "message": "line 3: no"}
    assert rejected["id"] != line["id"]
    assert response_line("a", 200, {}) == response_line("a", 200, {}), "the same in every run"


def test_a_body_with_half_a_character_is_still_written() -> None:
    """The wire lets lone surrogates pass; one answer with one must not end the job."""
    line = response_line("a", 200, {"text": "\ud83d"})
    assert json.loads(line.decode("utf-8"))["custom_id"] == "a"


def _paths(folder: Path) -> dict[str, Path]:
    (folder / "in.jsonl").write_text("{}")
    return {
        "input_path": folder / "in.jsonl",
        "output": folder / "out.jsonl",
        "errors": folder / "err.jsonl",
        "report": folder / "report.json",
    }


def test_good_paths_and_a_new_folder(tmp_path: Path) -> None:
    paths = _paths(tmp_path)
    paths["report"] = tmp_path / "new" / "folder" / "report.json"
    check_paths(**paths)
    assert paths["report"].parent.is_dir()
    assert not paths["output"].exists()


@pytest.mark.parametrize("one", ["input_path", "output", "errors"])
def test_no_two_paths_are_one(tmp_path: Path, one: str) -> None:
    paths = _paths(tmp_path)
    paths["report"] = paths[one].parent / "." / ".." / tmp_path.name / paths[one].name
    with pytest.raises(OutputError, match="are the same file"):
        check_paths(**paths)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_to_the_input_are_the_input(tmp_path: Path, link: Any) -> None:
    paths = _paths(tmp_path)
    link(paths["output"], paths["input_path"])
    with pytest.raises(OutputError, match="input and --output are the same file"):
        check_paths(**paths)


def test_a_link_to_a_file_still_to_be_written(tmp_path: Path) -> None:
    paths = _paths(tmp_path)
    paths["errors"].symlink_to(paths["output"])
    with pytest.raises(OutputError, match="--output and --errors are the same file"):
        check_paths(**paths)


@pytest.mark.parametrize("name", ["output", "errors", "report"])
def test_a_directory_is_no_file(tmp_path: Path, name: str) -> None:
    paths = _paths(tmp_path)
    paths[name].mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        check_paths(**paths)


@pytest.mark.parametrize("inner", ["a.jsonl", "sub/a.jsonl"])
def test_a_file_is_no_folder(tmp_path: Path, inner: str) -> None:
    paths = _paths(tmp_path)
    (tmp_path / "file").write_text("x")
    paths["output"] = tmp_path / "file" / inner
    with pytest.raises(OutputError, match="file"):
        check_paths(**paths)


@pytest.mark.parametrize("name", ["output", "errors", "report"])
def test_devices_and_pipes_are_not_replaced(tmp_path: Path, name: str) -> None:
    """``--errors /dev/null`` as root would put a regular file in its place."""
    paths = _paths(tmp_path)
    os.mkfifo(paths[name])
    with pytest.raises(OutputError):
        check_paths(**paths)


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
@pytest.mark.parametrize("inner", ["a.jsonl", "sub/a.jsonl"])
def test_unwritable_folder(tmp_path: Path, inner: str) -> None:
    paths = _paths(tmp_path)
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    paths["output"] = folder / inner
    with pytest.raises(OutputError, match="locked"):
        check_paths(**paths)


def test_unwritable_folder_for_root_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="is not writable: choose another --output"):
        check_paths(**_paths(tmp_path))
