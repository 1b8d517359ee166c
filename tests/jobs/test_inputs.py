"""Inputs as people have them: several files, compressed ones, pipes, standard input."""

from __future__ import annotations

import gzip
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from elbowroom.core.errors import InputError, OutputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.inputs import STDIN, BatchInput
from elbowroom.jobs.rows import RejectedRow, Row
from tests.jobs.plans import write_batch

NO_TEXT = (b"PK\x03\x04", b"PAR1", b"BZh9", b"\xfd7zXZ\x00", b"\x1f\x8b\x08", b"(\xb5/\xfd")


def is_no_text(data: bytes) -> bool:
    """Whether a file with this beginning is refused as a whole."""
    return data.startswith(NO_TEXT) or (data[:2] in (b"\xff\xfe", b"\xfe\xff") and 0 in data[2:4])


def rows_of(*paths: Path) -> list[Row | RejectedRow]:
    with BatchInput(paths) as source, BatchFile(source) as batch:
        return list(batch.scan().rows())


def ids_of(*paths: Path) -> list[str]:
    return [row.custom_id for row in rows_of(*paths)]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_batch(tmp_path / "a.jsonl", 3)


def in_two_parts(data: bytes) -> bytes:
    return gzip.compress(data[:9]) + gzip.compress(data[9:])


def in_two_frames(data: bytes) -> bytes:
    return zstandard.compress(data[:9]) + zstandard.compress(data[9:])


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.compress, in_two_parts, in_two_frames]
)
def test_a_compressed_file(plain: Path, compress: Callable[[bytes], bytes]) -> None:
    packed = plain.with_name("packed")  # what it is says its content, not its name
    packed.write_bytes(compress(plain.read_bytes()))
    assert rows_of(packed) == rows_of(plain)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_is_cut_off(plain: Path, compress: Callable[[bytes], bytes]) -> None:
    packed = plain.with_name("packed")
    whole = compress(os.urandom(200_000).hex().encode())
    for num_bytes in (len(whole) // 2, len(whole) - 1):
        packed.write_bytes(whole[:num_bytes])
        with pytest.raises(InputError, match="packed is damaged or cut off"):
            BatchInput([packed])
    packed.write_bytes(whole[:50_000] + b"?" * 50_000)
    with pytest.raises(InputError, match="packed is damaged or cut off"):
        BatchInput([packed])


def test_several_files_are_one_job(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.jsonl.gz"
    text = plain.read_text().replace("id-", "other-").replace('"POST"', '"GET"', 1)
    other.write_bytes(gzip.compress(text.rstrip("\n").encode()))
    without_end = tmp_path / "c.jsonl"
    without_end.write_text("\ufeff" + plain.read_text().rstrip("\n").replace("id-", "third-"))
    rows = rows_of(plain, other, without_end, plain.with_name("a.jsonl"))
    assert [row.custom_id for row in rows[:9]] == [
        *(f"id-{n}" for n in range(3)),
        *(f"other-{n}" for n in range(3)),
        *(f"third-{n}" for n in range(3)),
    ]
    places = [row.message.split(": ")[0] for row in rows if isinstance(row, RejectedRow)]
    again = [f"{plain}, line {number}" for number in (1, 2, 3)]
    assert places == [f"{other}, line 1", *again], "ids of one job are unique over all its files"
    assert [row.line_number for row in rows] == list(range(1, 13))


def test_standard_input_and_pipes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = io.TextIOWrapper(io.BytesIO(plain.read_bytes()))
    monkeypatch.setattr(sys, "stdin", given)
    assert ids_of(STDIN) == ["id-0", "id-1", "id-2"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[plain.read_bytes()])
    writer.start()
    assert ids_of(pipe) == ["id-0", "id-1", "id-2"]
    writer.join()
    packed = io.TextIOWrapper(io.BytesIO(gzip.compress(plain.read_bytes())))
    monkeypatch.setattr(sys, "stdin", packed)
    with pytest.raises(InputError, match="gives compressed data: decompress it on the way"):
        ids_of(STDIN)


@pytest.mark.parametrize("beginning", NO_TEXT[:4])
def test_what_holds_no_lines_is_refused_by_name(tmp_path: Path, beginning: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(beginning + b"rest")
    with pytest.raises(InputError, match=r"zip archive|Parquet|bzip2|by xz"):
        BatchInput([path])


def test_utf_16_is_refused_by_name(plain: Path) -> None:
    plain.write_text(plain.read_text(), encoding="utf-16")
    with pytest.raises(InputError, match="is UTF-16: save it as UTF-8"):
        BatchInput([plain])


def test_zstd_without_its_library(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.write_bytes(zstandard.compress(plain.read_bytes()))
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install zstandard, or decompress it"):
        BatchInput([plain])


def test_nothing_is_left_of_a_copy(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with BatchInput([plain, plain], folder) as source, BatchFile(source) as batch:
        assert batch.scan().num_rows == 6
        assert not list(folder.iterdir()), "also when we are killed"
    with pytest.raises(InputError, match="No such file"):
        BatchInput([plain, tmp_path / "missing"], folder)
    assert not list(folder.iterdir())


def test_a_disc_that_is_full(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match=f"cannot copy the input to {tmp_path}: No space left"):
        BatchInput([plain, plain], tmp_path)


def test_a_file_whose_beginning_was_joined_to_another(plain: Path) -> None:
    """Files that each began with a byte order mark, behind one another."""
    data = b"\xef\xbb\xbf" + plain.read_bytes()
    plain.write_bytes(data + data.replace(b"id-", b"other-"))
    assert ids_of(plain) == [f"{name}-{n}" for name in ("id", "other") for n in range(3)]
