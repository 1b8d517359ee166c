"""Reads OpenAI batch files, line by line. A line that cannot be used fails alone."""

from __future__ import annotations

import json
import math
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from elbowroom.core.errors import InputError

SUPPORTED_URLS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
MAX_LINE_BYTES = 16 * 1024**2
MAX_DEPTH = 128
"""Lists and objects inside one another. Python's own limit depends on how deep its caller is, so a
row near it could be read here and then fail where it is sent on."""

_MAX_SHOWN_CHARS = 80
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """A request. ``index`` counts non-blank lines from 0, ``line_number`` all lines from 1."""

    index: int
    line_number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A line that no engine will see, and why."""

    index: int
    line_number: int
    custom_id: str
    code: str
    message: str


class BatchFacts(NamedTuple):
    """What one pass over the file tells: its rows, and hashes of ids that occur more than once.

    No id in the file starts with ``made_up_prefix``: it is free for lines without one.
    """

    num_rows: int
    num_bytes: int
    duplicate_hashes: frozenset[int]
    made_up_prefix: str


class _RejectionError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Line(NamedTuple):
    number: int
    data: bytes | None  # None: longer than the cap, and not kept


def scan(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> BatchFacts:
    """Count rows and find duplicate ids. Keeps 8 bytes per row, whatever its length.

    Raises InputError when the file cannot be read or has no rows.
    """
    num_bytes = _file_bytes(path)
    hashes = array("Q")
    made_up_prefix = "line-"
    num_rows = 0
    for line in _lines(path, max_line_bytes):
        num_rows += 1
        try:
            custom_id = _usable_id(_load(line, max_line_bytes))
        except _RejectionError:
            continue
        if custom_id is not None:
            hashes.append(_hash(custom_id))
            made_up_prefix = _free_prefix(made_up_prefix, custom_id)
    if num_rows == 0:
        raise InputError(f"{path} has no rows: give one JSON request per line")
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    duplicates = frozenset(int(value) for value in values[counts > 1])
    return BatchFacts(num_rows, num_bytes, duplicates, made_up_prefix)


def read_rows(
    path: Path, facts: BatchFacts, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Row | RejectedRow]:
    """Every non-blank line, as a request or as the reason why it is none. Memory is one line.

    Of several lines with one ``custom_id`` the first is answered. The others are rejected under
    made-up ids (``line-17``), so that each id stands in the results once.

    Raises InputError when the file cannot be read, or no longer has the rows that ``scan`` saw.
    """
    num_rows = 0
    seen: set[str] = set()  # of ids that occur more than once, those that have come by
    for index, line in enumerate(_lines(path, max_line_bytes)):
        num_rows += 1
        if num_rows > facts.num_rows:
            break
        custom_id = None
        item: Row | RejectedRow
        try:
            data = _load(line, max_line_bytes)
            custom_id = _usable_id(data)
            if custom_id in seen:
                shown = _shown(custom_id)
                _reject("duplicate_custom_id", f"{shown} is used by an earlier line: rename it")
            item = _parse(index, line.number, data)
        except _RejectionError as rejection:
            if custom_id is None or custom_id in seen:
                custom_id = f"{facts.made_up_prefix}{line.number}"
            message = f"line {line.number}: {rejection}"
            item = RejectedRow(index, line.number, custom_id, rejection.code, message)
        if _hash(item.custom_id) in facts.duplicate_hashes:
            seen.add(item.custom_id)
        yield item
    if num_rows != facts.num_rows:
        raise InputError(f"{path} changed while it was read: leave it alone and run again")


def _file_bytes(path: Path) -> int:
    """The size of a regular file: a pipe could not be read twice."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file: write the requests to one and name it")
    return status.st_size


def _lines(path: Path, max_line_bytes: int) -> Iterator[_Line]:
    """Non-blank lines without their ends; one longer than the cap is skipped over, not kept."""
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(max_line_bytes + 1):
                number += 1
                if len(data) > max_line_bytes and not data.endswith(b"\n"):
                    _skip_line(file)
                    yield _Line(number, None)
                    continue
                if number == 1:
                    data = data.removeprefix(_BOM)
                if data := data.strip():
                    yield _Line(number, data)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot read {path}: {error.strerror}. Check its name and permissions; it must be a file "
        f"with one JSON request per line"
    )


def _skip_line(file: BinaryIO) -> None:
    while (data := file.readline(1024**2)) and not data.endswith(b"\n"):
        pass


def _load(line: _Line, max_line_bytes: int) -> Any:
    if line.data is None:
        _reject("line_too_long", f"longer than {max_line_bytes} bytes: split the request")
    try:
        data = _DECODER.decode(line.data.decode("utf-8"))
        if _may_be_deep(line.data) and _is_deeper_than(data, MAX_DEPTH):
            _reject("invalid_json", f"nested more than {MAX_DEPTH} deep: flatten it")
        if b"\\ud" in line.data.lower():  # half of a surrogate pair is no character
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        return data
    except UnicodeEncodeError:
        _reject("invalid_utf8", "a \\u escape is half of a surrogate pair: write both halves")
    except UnicodeDecodeError as error:
        _reject("invalid_utf8", f"not UTF-8 at byte {error.start}: save the file as UTF-8")
    except RecursionError:
        _reject("invalid_json", f"nested more than {MAX_DEPTH} deep: flatten it")
    except json.JSONDecodeError as error:
        _reject("invalid_json", f"not valid JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        _reject("invalid_json", f"not valid JSON: {error}")


def _parse(index: int, line_number: int, data: Any) -> Row:
    if not isinstance(data, dict):
        _reject("invalid_request", f"a JSON object is expected, not {type(data).__name__}")
    url, body = data.get("url"), data.get("body")
    custom_id = _usable_id(data)
    if custom_id is None:
        _reject("invalid_custom_id", "'custom_id' must be a non-empty string")
    if data.get("method") != "POST":
        _reject("invalid_method", f"'method' must be POST, not {_shown(data.get('method'))}")
    if not isinstance(url, str) or url not in SUPPORTED_URLS:
        supported = ", ".join(sorted(SUPPORTED_URLS))
        _reject("invalid_url", f"'url' must be one of {supported}, not {_shown(url)}")
    if not isinstance(body, dict):
        _reject("invalid_body", "'body' must be a JSON object")
    if body.get("stream"):
        _reject("stream_unsupported", "'stream' has no meaning in a batch: remove it")
    return Row(index, line_number, custom_id, url, body)


def _usable_id(data: Any) -> str | None:
    """The id of a line, if it has one, whatever else is wrong with it."""
    custom_id = data.get("custom_id") if isinstance(data, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id else None


def _free_prefix(prefix: str, custom_id: str) -> str:
    """The prefix, with enough dashes behind that ``custom_id`` does not start with it."""
    if not custom_id.startswith(prefix):
        return prefix
    rest = custom_id.removeprefix(prefix)
    return prefix + "-" * (len(rest) - len(rest.lstrip("-")) + 1)


def _hash(custom_id: str) -> int:
    data = custom_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {_shown(text)} is not finite")


def _finite(text: str) -> float:
    """A number such as 1e999 is valid JSON, but nothing downstream can write it again."""
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


def _may_be_deep(data: bytes) -> bool:
    """Cheap, and false for nearly every line: too few brackets to be nested so deep."""
    return data.count(b"[") + data.count(b"{") > MAX_DEPTH


def _is_deeper_than(data: Any, depth: int) -> bool:
    layer = [data]
    for _ in range(depth + 1):
        containers = [value for value in layer if isinstance(value, (dict, list))]
        layer = []
        for value in containers:
            layer.extend(value.values() if isinstance(value, dict) else value)
        if not containers:
            return False
    return True


def _shown(value: object) -> str:
    """A value from the file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


def _reject(code: str, message: str) -> NoReturn:
    raise _RejectionError(code, message)
