"""Inputs of a job: one file or several, compressed or not, or standard input."""

from __future__ import annotations

import gzip
import importlib
import os
import stat
import sys
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from elbowroom.core.errors import InputError, OutputError
from elbowroom.jobs import parquet_input
from elbowroom.jobs.parquet import MAGIC as _PARQUET
from elbowroom.jobs.parquet import is_named_parquet

STDIN = Path("-")
"""The path that means standard input."""

_CHUNK_BYTES = 1024**2
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it",
    _PARQUET: "a Parquet file: name it .parquet, or write its rows as JSON lines",
    b"BZh9": "compressed by bzip2: decompress it, or use gzip or zstd",
    b"\xfd7zXZ\x00": "compressed by xz: decompress it, or use gzip or zstd",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_MAGIC = 6


class _Part(NamedTuple):
    """One file of several. ``before`` is the number of lines in the files before it."""

    name: str
    before: int
    unit: str


class BatchInput:
    """The lines of a job. Use as a context manager; ``open`` gives them again each time.

    One plain file is read where it is. Several files, compressed ones, Parquet and standard input
    are copied, one after the other, into a temporary file in ``folder``: rows are read more than
    once, and not in file order. The rows of a Parquet file become lines.
    """

    def __init__(self, paths: Sequence[Path], folder: Path | None = None) -> None:
        """Open the inputs, and copy them if needed.

        Raises InputError for files that cannot be read or hold no JSON lines, OutputError if
        copying fails.
        """
        if not paths:
            raise InputError("a job needs at least one input: give --input")
        self.name = input_name(paths)
        self._paths = tuple(paths)
        self._parts: list[_Part] = []
        self._copy: IO[bytes] | None = None
        kinds = [_kind(path) for path in paths]
        if kinds != ["plain"]:
            with _copying(folder):
                self._copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (see close)
            try:
                self._copy_all(kinds, folder)
            except BaseException:
                self._copy.close()
                raise

    def __enter__(self) -> BatchInput:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()

    def open(self) -> IO[bytes]:
        """Open all lines as one file; a copy serves one reader at a time. Raises OSError."""
        if self._copy is None:
            return self._paths[0].open("rb")
        self._copy.seek(0)
        return os.fdopen(os.dup(self._copy.fileno()), "rb")

    def place(self, line_number: int) -> str:
        """Location of a line, for messages; lines are counted from 1 over all files."""
        if not self._parts:
            return f"line {line_number}"
        part = self._parts[bisect_right(self._parts, line_number - 1, key=lambda p: p.before) - 1]
        place = f"{part.unit} {line_number - part.before}"
        return place if len(self._parts) == 1 else f"{part.name}, {place}"

    def _copy_all(self, kinds: Sequence[str], folder: Path | None) -> None:
        assert self._copy is not None
        num_lines = 0
        for path, kind in zip(self._paths, kinds, strict=True):
            self._parts.append(_Part(str(path), num_lines, "row" if kind == "parquet" else "line"))
            last, is_first = b"\n", True
            for chunk in _explained_chunks(path, kind):
                if is_first and kind in ("stdin", "pipe") and _look_at(chunk, path) != "plain":
                    raise InputError(f"{path} gives compressed data: decompress it on the way")
                is_first = False
                with _copying(folder):
                    self._copy.write(chunk)
                num_lines += chunk.count(b"\n")
                last = chunk[-1:]
            if last != b"\n":  # the next file's first line is one of its own
                with _copying(folder):
                    self._copy.write(b"\n")
                num_lines += 1
        with _copying(folder):
            self._copy.flush()


def input_name(paths: Sequence[Path]) -> str:
    """Name of a job's files in messages."""
    others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{'standard input' if paths[0] == STDIN else paths[0]}{others}"


@contextmanager
def _copying(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot copy the input to {folder or tempfile.gettempdir()}: {error.strerror}. Free "
            f"some space, or give one plain file, which is read where it lies"
        ) from error


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn an error of reading into an InputError that says what to check."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or cut off: {error}. Make it again") from error
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}. Check its name and permissions; it "
            f"must be a file with one JSON request per line"
        ) from error


def _kind(path: Path) -> str:
    """Kind of an input: stdin, pipe, plain, gzip, zstd or parquet.

    Raises InputError for what cannot hold JSON lines.
    """
    if path == STDIN:
        return "stdin"
    with explained(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            if stat.S_ISDIR(mode):
                raise InputError(f"{path} is a folder: name the files in it")
            return "pipe"
        with path.open("rb") as file:
            beginning = file.read(_LONGEST_MAGIC)
        if not is_named_parquet(path):
            return _look_at(beginning, path)
        if not beginning.startswith(_PARQUET):
            raise InputError(f"{path} is no Parquet file: name it by what it is, or write it again")
        return "parquet"


def _look_at(beginning: bytes, path: Path) -> str:
    """Kind of a file by its first bytes: plain, gzip or zstd. Raises InputError for others."""
    if beginning.startswith(_GZIP):
        return "gzip"
    if beginning.startswith(_ZSTD):
        return "zstd"
    for magic, what in _FOREIGN.items():
        if beginning.startswith(magic):
            raise InputError(f"{path} is {what}, with one JSON request per line")
    if beginning[:2] in _UTF16 and 0 in beginning[2:4]:
        raise InputError(f"{path} is UTF-16: save it as UTF-8")
    return "plain"


def _explained_chunks(path: Path, kind: str) -> Iterator[bytes]:
    chunks = _chunks(path, kind)
    while True:
        with explained(path):
            chunk = next(chunks, None)
        if chunk is None:
            return
        if chunk:
            yield chunk


def _chunks(path: Path, kind: str) -> Iterator[bytes]:
    """Contents of a file, decompressed. Raises EOFError and others for one that is cut off."""
    if kind == "stdin":
        yield from _read(sys.stdin.buffer)
        return
    if kind == "parquet":
        yield from parquet_input.read_lines(path)
        return
    with path.open("rb") as file:
        if kind == "gzip":
            with gzip.open(file) as lines:
                yield from _read(lines)
        elif kind == "zstd":
            yield from _decompress(_read(file), path)
        else:
            yield from _read(file)


def _read(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _decompress(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Decompress zstd frames, one after the other. Raises EOFError for damaged or cut ones."""
    make, failure = _zstd(path)
    frame = None
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                frame = frame or make()
                yield frame.decompress(rest)
                if not frame.eof:
                    break
                rest, frame = frame.unused_data, None
    except failure as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the last frame has no end")


def _zstd(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Maker of decompressors for one frame, and their error: Python 3.14's, or a package's.

    Raises InputError if there is neither.
    """
    library: Any
    try:
        library = importlib.import_module("compression.zstd")
        return library.ZstdDecompressor, library.ZstdError
    except ImportError:
        pass
    try:
        library = importlib.import_module("zstandard")
    except ImportError as error:
        raise InputError(
            f"{path} is compressed by zstd: pip install zstandard, or decompress it"
        ) from error
    return lambda: library.ZstdDecompressor().decompressobj(), library.ZstdError
