"""Reader of OpenAI batch files, line by line. A line that cannot be used fails alone."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from elbowroom.core.errors import InputError, shown
from elbowroom.jobs.inputs import BatchInput, explained
from elbowroom.jobs.limits import RowLimits, violation
from elbowroom.jobs.rows import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    RESPONSES,
    SCORE,
    RejectedRow,
    Row,
)
from elbowroom.jobs.strict_json import RejectionError, load_any_json, load_json, reject

SUPPORTED_URLS = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, SCORE, RERANK})

_DEPLOYMENT = re.compile(r"^(/openai)?/deployments/[^/]+|^/openai(/v1)?(?=/)")
_MAX_URL = 1000
_GUIDED = {
    f"guided_{name}": name for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")
}
"""Fields of older versions of vLLM, and what they are called in 'structured_outputs' now."""

_BOM = b"\xef\xbb\xbf"


class _Line(NamedTuple):
    number: int
    offset: int
    data: bytes | None  # None: longer than the cap, and not kept
    content_hash: int


Visitor = Callable[[Row | RejectedRow], None]
"""Callback for every row in turn. Repeated ids and made-up ids are not known yet at that time."""


class BatchFile:
    """A batch file after one pass over it: its rows can be read in any order.

    Of several lines with one ``custom_id`` the first that is JSON is answered. The others, and
    lines without an id, are rejected under made-up ids (``line-17``) that no line of the file uses,
    so that each id is in the results once. Takes 29 bytes per row. Keeps the file open, so
    replacing it meanwhile does no harm. Use as a context manager.
    """

    def __init__(self, source: BatchInput | Path, limits: RowLimits | None = None) -> None:
        """Open the file; ``scan`` comes next. Raises InputError when it cannot be opened."""
        self._own_input = BatchInput([source]) if isinstance(source, Path) else None
        self._input = self._own_input or cast(BatchInput, source)
        self.name = self._input.name
        self._limits = limits or RowLimits()
        self._offsets = array("Q")
        self._line_numbers = array("I")
        self._content_hashes = array("Q")
        self._id_hashes = np.empty(0, np.uint64)
        self._has_own_id = np.empty(0, bool)
        self._made_up_prefix = "line-"
        with explained(self.name):
            self._file = self._input.open()
        self.num_bytes = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> BatchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._own_input is not None:
            self._own_input.close()

    def scan(self, *visitors: Visitor) -> BatchFile:
        """Find the rows, and ids that occur twice. Raises InputError when there are no rows."""
        id_hashes = array("Q")
        has_id, is_read = bytearray(), bytearray()
        for line in self._lines():
            index = len(self._offsets)
            self._offsets.append(line.offset)
            self._line_numbers.append(line.number)
            self._content_hashes.append(line.content_hash)
            data = None
            row: Row | RejectedRow
            try:
                data = self._load(line)
                row = self._parse(index, line, data)
                custom_id: str | None = row.custom_id
            except RejectionError as rejection:
                custom_id = _id_of(line, data)
                row = self._rejected(index, line, custom_id or "", rejection)
            has_id.append(custom_id is not None)
            is_read.append(data is not None)
            id_hashes.append(0 if custom_id is None else hash_id(custom_id))
            if custom_id is not None:
                self._made_up_prefix = _free_prefix(self._made_up_prefix, custom_id)
            for visit in visitors:
                visit(row)
        if not self._offsets:
            raise InputError(f"{self.name} has no rows: give one JSON request per line")
        self._id_hashes = np.frombuffer(id_hashes, np.uint64)
        usable, read = np.frombuffer(has_id, bool), np.frombuffer(is_read, bool)
        # A line that is no JSON has its id only if no other line has.
        lines = np.concatenate([np.flatnonzero(usable & read), np.flatnonzero(usable & ~read)])
        _, first = np.unique(self._id_hashes[lines], return_index=True)
        self._has_own_id = np.zeros(len(usable), bool)
        self._has_own_id[lines[first]] = True
        return self

    @property
    def num_rows(self) -> int:
        return len(self._offsets)

    def rows(self, order: Iterable[int] | None = None) -> Iterator[Row | RejectedRow]:
        """The rows with these indices, or all in input order, one at a time."""
        return map(self.read, range(self.num_rows) if order is None else order)

    def read(self, index: int) -> Row | RejectedRow:
        """Read a row: a request, or the reason why it is not one.

        Raises InputError when the file cannot be read, or no longer has the row that was seen.
        """
        with explained(self.name):
            line = self._line_at(index)
        if line.content_hash != self._content_hashes[index]:
            raise InputError(
                f"{self.name} changed while it was read (line {line.number}): restore it and run "
                f"again; finished rows are kept"
            )
        data = None
        try:
            data = self._load(line)
            own_id = _usable_id(data)
            if own_id is not None and not self._has_own_id[index]:
                reject(
                    "duplicate_custom_id",
                    f"{shown(own_id)} is used by an earlier line: rename it",
                )
            return self._parse(index, line, data)
        except RejectionError as rejection:
            own_id = _id_of(line, data) if self._has_own_id[index] else None
            custom_id = own_id or f"{self._made_up_prefix}{line.number}"
            return self._rejected(index, line, custom_id, rejection)

    def duplicates(self) -> list[int]:
        """Indices of rows whose id an earlier line uses."""
        return [int(index) for index in np.flatnonzero((self._id_hashes != 0) & ~self._has_own_id)]

    def find(self, content_hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, Any]:
        """Index of the first row that has each content hash, or -1; duplicates are passed over.

        Lines over the cap are found, too.
        """
        lines = np.flatnonzero(self._has_own_id | (self._id_hashes == 0))
        own = np.frombuffer(self._content_hashes, np.uint64)[lines]
        order = np.argsort(own, kind="stable")
        at = order[np.minimum(np.searchsorted(own, content_hashes, sorter=order), len(own) - 1)]
        return np.where(own[at] == content_hashes, lines[at], -1)

    def has_id(self, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Mask of lines whose id could be read. One over the cap has none, whatever it holds."""
        mask: np.ndarray[Any, Any] = self._id_hashes[indices] != 0
        return mask

    def find_meanings(self, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, Any]:
        """Index of the first row with each ``Row.meaning_hash``, or -1. Reads the whole file."""
        wanted, found = set(hashes.tolist()), dict[int, int]()
        for row in self.rows():
            if isinstance(row, Row) and row.meaning_hash in wanted:
                found.setdefault(row.meaning_hash, row.index)
        return np.array([found.get(each, -1) for each in hashes.tolist()], np.int64)

    def content_hash(self, index: int) -> int:
        return self._content_hashes[index]

    def id_hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """``hash_id`` of the id under which each row is in the results, in input order."""
        hashes = self._id_hashes.copy()
        for index in np.flatnonzero(~self._has_own_id):
            hashes[index] = hash_id(f"{self._made_up_prefix}{self._line_numbers[index]}")
        return hashes

    def _lines(self) -> Iterator[_Line]:
        """Non-blank lines without their ends; one longer than the cap is skipped over, not kept."""
        with explained(self.name):
            self._file.seek(0)
            number = offset = 0
            while True:
                number += 1
                line, num_bytes = self._next_line(number, offset)
                if num_bytes == 0:
                    return
                if line is not None:
                    yield line
                offset += num_bytes

    def _line_at(self, index: int) -> _Line:
        offset = self._offsets[index]
        self._file.seek(offset)
        line, _ = self._next_line(self._line_numbers[index], offset)
        return line or _Line(self._line_numbers[index], offset, None, 0)

    def _next_line(self, number: int, offset: int) -> tuple[_Line | None, int]:
        """The line that starts here, None for a blank one, and its bytes, 0 at the end."""
        data = self._file.readline(self._limits.max_line_bytes + 1)
        num_bytes = len(data)
        if num_bytes > self._limits.max_line_bytes and not data.endswith(b"\n"):
            content_hash = _hash_stripped(self._parts_of_line(data.removeprefix(_BOM)))
            return _Line(number, offset, None, content_hash), self._file.tell() - offset
        data = data.removeprefix(_BOM).strip()  # where files were joined, at any line
        if not data:
            return None, num_bytes
        return _Line(number, offset, data, _hash(data)), num_bytes

    def _parts_of_line(self, part: bytes) -> Iterator[bytes]:
        """A line from ``part`` on, which has been read, to its end."""
        while part:
            yield part
            part = b"" if part.endswith(b"\n") else self._file.readline(1024**2)

    def _rejected(
        self, index: int, line: _Line, custom_id: str, reason: RejectionError
    ) -> RejectedRow:
        message = f"{self._input.place(line.number)}: {reason}"
        return RejectedRow(index, line.number, custom_id, reason.code, message)

    def _load(self, line: _Line) -> Any:
        if line.data is None:
            most = self._limits.max_line_bytes
            reject("line_too_long", f"longer than {most} bytes: split it or raise --max-line-bytes")
        return load_json(line.data)

    def _parse(self, index: int, line: _Line, data: Any) -> Row:
        row = _parse(index, line, data, self._input)
        if broken := violation(row.body, self._limits):
            reject(broken.code, broken.message)
        return row


def hash_id(custom_id: str) -> int:
    """64-bit hash of an id, for use where a million ids must fit in memory."""
    return _hash(custom_id.encode("utf-8", "surrogatepass"))


def _parse(index: int, line: _Line, data: Any, source: BatchInput) -> Row:
    if not isinstance(data, dict):
        reject("invalid_request", f"a JSON object is expected, not {type(data).__name__}")
    url, body = data.get("url"), data.get("body")
    custom_id = _usable_id(data)
    if custom_id is None:
        reject("invalid_custom_id", "'custom_id' must be a non-empty string")
    if data.get("method") != "POST":
        reject("invalid_method", f"'method' must be POST, not {shown(data.get('method'))}")
    known = _known_url(url)
    if known is None:
        supported = ", ".join(sorted(SUPPORTED_URLS))
        reject("invalid_url", f"'url' must be one of {supported}, not {shown(url)}")
    if not isinstance(body, dict):
        reject("invalid_body", "'body' must be a JSON object")
    _check_body(body)
    return Row(index, line.number, custom_id, known, body, line.content_hash, source)


def _known_url(url: Any) -> str | None:
    """The endpoint that a URL names, also by Azure's names: with a deployment, or no version."""
    if not isinstance(url, str):
        return None
    if url in SUPPORTED_URLS:
        return url
    path = _DEPLOYMENT.sub("", url.partition("?")[0]) if len(url) < _MAX_URL else ""
    return f"/v1{path}" if f"/v1{path}" in SUPPORTED_URLS else None


def _check_body(body: dict[str, Any]) -> None:
    """Reject what vLLM would ignore, or answer in a form that a result file cannot hold."""
    if body.get("stream"):
        reject("stream_unsupported", "'stream' has no meaning in a batch: remove it")
    if body.get("encoding_format") in ("bytes", "bytes_only"):
        reject("invalid_body", "'encoding_format' bytes is no JSON: ask for base64 or float")
    if _GUIDED.keys().isdisjoint(body):
        return
    for name in _GUIDED:
        if body.get(name) is not None:
            reject(
                "field_removed",
                f"vLLM ignores '{name}': write 'structured_outputs': {{'{_GUIDED[name]}': ...}}",
            )


def _usable_id(data: Any) -> str | None:
    """The id of a line, if it has one, whatever else is wrong with it."""
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id else None


def _id_of(line: _Line, data: Any) -> str | None:
    """The id of a line that is no request, if it can be read: from JSON of any kind, too."""
    if data is None and line.data is not None:
        data = load_any_json(line.data)
    custom_id = _usable_id(data)
    try:
        (custom_id or "").encode()
    except UnicodeEncodeError:
        return None
    return custom_id


def _free_prefix(prefix: str, custom_id: str) -> str:
    """The prefix, with enough dashes appended that ``custom_id`` does not start with it."""
    if not custom_id.startswith(prefix):
        return prefix
    rest = custom_id.removeprefix(prefix)
    return prefix + "-" * (len(rest) - len(rest.lstrip("-")) + 1)


def _hash(data: bytes) -> int:
    return _as_int(blake2b(data, digest_size=8).digest())


def _hash_stripped(parts: Iterable[bytes]) -> int:
    """``_hash`` of parts put together, without white space around them. None is kept."""
    whole = to_last_char = blake2b(digest_size=8)
    is_begun = False
    for part in parts:
        part = part if is_begun else part.lstrip()
        is_begun = is_begun or bool(part)
        if kept := part.rstrip():
            to_last_char = whole.copy()
            to_last_char.update(kept)
        whole.update(part)
    return _as_int(to_last_char.digest())


def _as_int(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
