"""The journal: what was committed is there whatever dies, and it belongs to one job."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elbowroom.core.errors import InputError, OutputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow, JournalReader, journal_folder
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.rows import Row
from tests.jobs.plans import write_batch

ROOT = Path(__file__).parents[2]
IDENTITY = {"model": "abc", "seed": "0"}


def finished(batch: BatchFile, index: int, failure: str | None = None) -> FinishedRow:
    row = batch.read(index)
    assert isinstance(row, Row)
    line = f'{{"custom_id":"{row.custom_id}"}}\n'.encode()
    return FinishedRow(index, row.custom_id, row.content_hash, failure, line, 4, 2)


def open_rows(output: Path, path: Path, **identity: str) -> list[int]:
    """Indices of rows that are finished, as a new run sees it."""
    with Journal(output) as journal, BatchFile(path) as batch:
        mask = journal.admit({**IDENTITY, **identity}, batch.scan())
        return [index for index, is_finished in enumerate(mask) if is_finished]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A journal beside this file holds rows 1 and 3 of 5."""
    write_batch(tmp_path / "in.jsonl", 5)
    output = tmp_path / "out.jsonl"
    with Journal(output) as journal, BatchFile(tmp_path / "in.jsonl") as batch:
        assert not journal.admit(IDENTITY, batch.scan()).any()
        for index in (3, 1):
            journal.put(finished(batch, index, "http_400" if index == 3 else None))
        assert journal.totals.num_finished == 0, "not safe yet"
        journal.commit()
        assert journal.totals.num_finished == 2
    return output


def test_finished_rows_are_found_again(output: Path, tmp_path: Path) -> None:
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3]
    with JournalReader(output) as reader:
        totals = reader.totals()
        assert (totals.num_succeeded, totals.failures) == (1, {"http_400": 1})
        assert (totals.prompt_tokens, totals.output_tokens) == (8, 4)
        assert list(reader.lines()) == [b'{"custom_id":"id-1"}\n', b'{"custom_id":"id-3"}\n']
        assert list(reader.lines(succeeded=False)) == [b'{"custom_id":"id-3"}\n']


def test_files_are_private(output: Path) -> None:
    folder = journal_folder(output)
    assert folder.stat().st_mode & 0o777 == 0o700
    with Journal(output):
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600, path


def test_an_input_that_grew_is_the_same_job(output: Path, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 9)
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3]


def test_rows_are_known_by_what_they_say_and_not_by_their_place(
    output: Path, tmp_path: Path
) -> None:
    lines = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in.jsonl").write_text("\n\n" + "".join([lines[3], lines[1], "{bad\n", lines[0]]))
    assert open_rows(output, tmp_path / "in.jsonl") == [0, 1]
    with JournalReader(output) as reader:
        assert list(reader.lines()) == [b'{"custom_id":"id-3"}\n', b'{"custom_id":"id-1"}\n']


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_finished_row_that_is_gone_or_changed_is_refused(
    output: Path, tmp_path: Path, change: str
) -> None:
    lines = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    lines[1] = "" if change == "gone" else lines[1].replace("say 1", "say what")
    (tmp_path / "in.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=r"line of 'id-1', which was answered, .*--restart"):
        open_rows(output, tmp_path / "in.jsonl")
    write_batch(tmp_path / "in.jsonl", 5)
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3], "nothing was lost by it"


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_failed_row_that_is_gone_or_changed_is_forgotten(
    output: Path, tmp_path: Path, change: str
) -> None:
    lines = (tmp_path / "in.jsonl").read_text().splitlines(keepends=True)
    lines[3] = "" if change == "gone" else lines[3].replace("say 3", "say what")
    (tmp_path / "in.jsonl").write_text("".join(lines))
    assert open_rows(output, tmp_path / "in.jsonl") == [1]
    with JournalReader(output) as reader:
        assert reader.totals().num_failed == 0


@pytest.mark.parametrize("padding", ["", " " * 3 * 1024**2])
def test_a_cap_below_an_answered_row_is_named(output: Path, tmp_path: Path, padding: str) -> None:
    """The line is neither gone nor changed, with or without space around it."""
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    lines[1] = f"{padding}{lines[1]}{padding}"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    limits = RowLimits(max_line_bytes=20)
    with (
        Journal(output) as journal,
        BatchFile(tmp_path / "in.jsonl", limits) as batch,
        pytest.raises(InputError, match=r"'id-1', .* is longer than --max-line-bytes"),
    ):
        journal.admit(IDENTITY, batch.scan())
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3]


def test_another_job_is_refused_by_the_field_that_differs(output: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model was abc, now it is xyz.*--restart"):
        open_rows(output, tmp_path / "in.jsonl", model="xyz")
    with pytest.raises(InputError, match="engine was not there, now it is 7"):
        open_rows(output, tmp_path / "in.jsonl", engine="7")
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3]


def test_restart_drops_everything(output: Path, tmp_path: Path) -> None:
    with Journal(output, restart=True) as journal, BatchFile(tmp_path / "in.jsonl") as batch:
        assert not journal.admit({"model": "xyz"}, batch.scan()).any()


def test_lines_that_are_no_request_are_judged_anew(output: Path, tmp_path: Path) -> None:
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"custom_id": "torn", "meth')
    with Journal(output) as journal, BatchFile(tmp_path / "in.jsonl") as batch:
        journal.admit(IDENTITY, batch.scan())
        journal.put(FinishedRow(5, "line-6", None, "invalid_json", b"{}\n"))
        journal.commit()
        assert journal.totals.num_finished == 3
    assert open_rows(output, tmp_path / "in.jsonl") == [1, 3]


def test_two_runs_at_once(output: Path) -> None:
    with (
        Journal(output),
        pytest.raises(OutputError, match=r"another run is writing .*elbowroom status"),
        Journal(output),
    ):
        pass


def test_a_reader_sees_whether_a_run_is_on(output: Path) -> None:
    with JournalReader(output) as reader:
        assert not reader.is_running()
        with Journal(output) as journal:
            assert reader.is_running()
            journal.note(pid=7)
            assert reader.facts()["pid"] == 7
        assert not reader.is_running()


def test_reading_where_no_job_was(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name the --output of a run"):
        JournalReader(tmp_path / "out.jsonl")


def test_commits_come_by_themselves(output: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with (
        Journal(
            output, on_commit=lambda rows: told.extend(row.custom_id for row in rows)
        ) as journal,
        BatchFile(tmp_path / "in.jsonl") as batch,
    ):
        journal.admit(IDENTITY, batch.scan())
        journal.put(finished(batch, 0))
        journal.tick()
        assert told == []
        time.sleep(0.6)
        journal.tick()
        assert told == ["id-0"]
        journal.put(finished(batch, 2))
    assert told == ["id-0", "id-2"], "the last rows are kept at the end"


def test_a_clock_that_is_set_back_changes_nothing(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with Journal(output) as journal, BatchFile(tmp_path / "in.jsonl") as batch:
        journal.admit(IDENTITY, batch.scan())
        journal.put(finished(batch, 0))
        time.sleep(0.6)
        journal.tick()
        assert journal.totals.num_finished == 3


_WRITE = """
import sys, time
from pathlib import Path
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow

with Journal(Path(sys.argv[1])) as journal:
    for index in range(100, 10**6):
        journal.put(FinishedRow(index, f"id-{index}", index, None, b"x" * 500))
        journal.commit()
        print(index, flush=True)
"""


def test_what_was_committed_survives_kill_9(output: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITE, str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    reported = [int(writer.stdout.readline()) for _ in range(50)]
    writer.kill()
    rest, _ = writer.communicate()
    reported += [int(line) for line in rest.splitlines()]
    assert writer.returncode == -signal.SIGKILL
    with Journal(output) as journal:  # its lock died with it
        assert journal.totals.num_finished >= len(reported) + 2


@pytest.mark.parametrize("num_bytes", [1, 700, 5000])
def test_a_torn_tail_costs_only_what_was_torn(output: Path, num_bytes: int) -> None:
    """As after a power failure: the write-ahead log ends in the middle of a commit."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITE, str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    for _ in range(30):
        writer.stdout.readline()
    writer.kill()
    writer.communicate()
    log = journal_folder(output) / "journal.sqlite-wal"
    os.truncate(log, log.stat().st_size - num_bytes)
    with Journal(output) as journal:
        assert journal.totals.num_finished >= 2 + 25
        assert len(list(journal.lines(succeeded=True))) == journal.totals.num_succeeded


def test_a_damaged_journal_is_explained(output: Path, tmp_path: Path) -> None:
    path = journal_folder(output) / "journal.sqlite"
    path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(OutputError, match=r"it is damaged: restore it .*, or use --restart"):
        open_rows(output, tmp_path / "in.jsonl")
    with Journal(output, restart=True) as journal:
        assert journal.totals.num_finished == 0


def test_a_journal_of_another_version(output: Path, tmp_path: Path) -> None:
    database = sqlite3.connect(journal_folder(output) / "journal.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(OutputError, match="written by another version"):
        open_rows(output, tmp_path / "in.jsonl")


_FILL_DISK = """
import resource, signal, sys
from pathlib import Path
from elbowroom.core.errors import OutputError
from elbowroom.jobs.journal import Journal
from elbowroom.jobs.journal_reader import FinishedRow

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
with Journal(Path(sys.argv[1])) as journal:
    journal.put(FinishedRow(10, "id-10", 10, None, b"a" * 1000))
    journal.commit()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    journal.put(FinishedRow(11, "id-11", 11, None, b"b" * 200_000))
    try:
        journal.commit()
    except OutputError as error:
        print(error)
    print(journal.totals.num_finished)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    journal.commit()
    print(journal.totals.num_finished)
"""


def test_a_full_disk_is_explained_and_the_row_can_be_kept_later(output: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FILL_DISK, str(output)], capture_output=True, text=True, cwd=ROOT
    )
    message, before, after = done.stdout.splitlines()
    assert "cannot use the journal" in message
    assert "finished rows are kept" in message
    assert (before, after) == ("3", "4")
    assert done.stderr == ""


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        Journal(tmp_path / "file" / "out.jsonl")
