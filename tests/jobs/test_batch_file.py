"""Batch files: what is accepted, and how every unusable line fails alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.jobs import batch_file
from elbowroom.jobs.batch_file import RejectedRow, Row, read_rows, scan

Item = Row | RejectedRow


def _line(custom_id: object = "a", **changes: Any) -> bytes:
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "hello"},
        **changes,
    }
    return json.dumps(line).encode()


def _read(path: Path, data: bytes, **options: int) -> list[Item]:
    path = path / "batch.jsonl" if path.is_dir() else path
    path.write_bytes(data)
    return list(read_rows(path, scan(path, **options), **options))


def _ids(items: list[Item]) -> list[str]:
    return [item.custom_id for item in items]


def test_a_good_row(tmp_path: Path) -> None:
    items = _read(tmp_path, _line("é", body={"prompt": "hi", "n": 2}, url="/v1/embeddings"))
    assert items == [Row(0, 1, "é", "/v1/embeddings", {"prompt": "hi", "n": 2})]


DEEP = b'{"custom_id":"a","body":' + b"[" * 100_000

REJECTED: list[tuple[str, bytes]] = [
    ("invalid_json", b"{"),
    ("invalid_json", _line()[:-9]),
    ("invalid_json", _line() + _line()),
    ("invalid_json", DEEP),
    ("invalid_json", _line(body={"temperature": float("nan")})),
    ("invalid_json", _line(body={"temperature": float("-inf")})),
    ("invalid_json", _line(body={"t": "x"}).replace(b'"x"', b"1e999")),
    ("invalid_json", _line(body={"t": "x"}).replace(b'"x"', b"9" * 5000)),
    ("invalid_utf8", b'{"custom_id": "\xff"}'),
    ("invalid_utf8", _line(body={"prompt": "\ud800"})),
    ("invalid_utf8", _line(body={"\udfff": 1})),
    ("invalid_utf8", _line("\ud800").replace(b"\\ud800", b"\\uD800")),
    ("invalid_request", b"[]"),
    ("invalid_request", b'"text"'),
    ("invalid_request", b"null"),
    ("invalid_custom_id", _line(None)),
    ("invalid_custom_id", _line("")),
    ("invalid_custom_id", _line(7)),
    ("invalid_custom_id", b"{}"),
    ("invalid_method", _line(method="GET")),
    ("invalid_method", _line(method=None)),
    ("invalid_url", _line(url="/v1/models")),
    ("invalid_url", _line(url="http://169.254.169.254/v1/completions")),
    ("invalid_url", _line(url=["/v1/completions"])),
    ("invalid_body", _line(body=None)),
    ("invalid_body", _line(body=[1])),
    ("stream_unsupported", _line(body={"stream": True})),
]


@pytest.mark.parametrize(("code", "data"), REJECTED, ids=lambda value: repr(value)[:50])
def test_an_unusable_line_fails_alone(tmp_path: Path, code: str, data: bytes) -> None:
    before, bad, after = _read(tmp_path, b"\n".join([_line("first"), data, _line("last")]))
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert isinstance(bad, RejectedRow)
    assert (bad.code, bad.index, bad.line_number) == (code, 1, 2)
    assert bad.message.startswith("line 2: ")
    assert len(bad.message) < 500


def test_stream_false_is_fine(tmp_path: Path) -> None:
    assert isinstance(_read(tmp_path, _line(body={"stream": False}))[0], Row)


def test_a_rejected_line_keeps_its_id(tmp_path: Path) -> None:
    assert _ids(_read(tmp_path, _line("mine", method="GET"))) == ["mine"]


def test_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, _line("😀"))
    assert row.custom_id == "😀"


@pytest.mark.parametrize(
    "data",
    [
        b"%b\n%b\n",
        b"%b\n%b",
        b"%b\r\n%b\r\n",
        b"\xef\xbb\xbf%b\n%b\n",
        b"\xef\xbb\xbf\n%b\n\n  \t\r\n%b\n\n",
    ],
    ids=["plain", "no final newline", "CRLF", "BOM", "blank lines"],
)
def test_line_ends(tmp_path: Path, data: bytes) -> None:
    items = _read(tmp_path, data % (_line("a"), _line("b")))
    assert all(isinstance(item, Row) for item in items)
    assert _ids(items) == ["a", "b"]
    assert [item.index for item in items] == [0, 1]
    numbers = [1 + data.split(b"%b")[0].count(b"\n")]
    numbers.append(numbers[0] + data.split(b"%b")[1].count(b"\n"))
    assert [item.line_number for item in items] == numbers


def test_too_long_lines_are_skipped_not_kept(tmp_path: Path) -> None:
    cap = len(_line("a"))
    long = _line("long", body={"prompt": "x" * 3_000_000})
    items = _read(tmp_path, b"\n".join([_line("a"), long, _line("b"), long]), max_line_bytes=cap)
    assert [getattr(item, "code", None) for item in items] == [
        None,
        "line_too_long",
        None,
        "line_too_long",
    ]
    assert _ids(items) == ["a", "line-2", "b", "line-4"]
    assert f"longer than {cap} bytes" in getattr(items[1], "message", "")


def test_of_duplicates_the_first_is_answered(tmp_path: Path) -> None:
    items = _read(tmp_path, b"\n".join([_line("x"), _line("y"), _line("x"), _line("x")]))
    assert [type(item) for item in items] == [Row, Row, RejectedRow, RejectedRow]
    assert _ids(items) == ["x", "y", "line-3", "line-4"]
    assert {item.code for item in items if isinstance(item, RejectedRow)} == {"duplicate_custom_id"}


def test_made_up_ids_avoid_real_ones(tmp_path: Path) -> None:
    """Before, on and after the line that needs one; twice; and as duplicates themselves."""
    lines = [_line("line-2"), b"{", b"{", _line("line-3"), _line("line-2"), _line("line-6"), b"["]
    items = _read(tmp_path, b"\n".join(lines))
    assert len(set(_ids(items))) == 7
    assert [i for i, item in enumerate(items) if isinstance(item, Row)] == [0, 3, 5]
    assert _ids(items)[0::3] == ["line-2", "line-3", "line-7"]


def test_made_up_ids_avoid_even_a_guessed_one(tmp_path: Path) -> None:
    guessed = f"line-3-{batch_file._hash('line-3'):016x}"
    items = _read(tmp_path, b"\n".join([_line("line-3"), _line(guessed), b"{"]))
    assert len(set(_ids(items))) == 3


@pytest.mark.parametrize("data", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf\n"])
def test_no_rows(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match="has no rows"):
        _read(tmp_path, data)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl: No such file"):
        scan(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Is a directory"):
        scan(tmp_path)


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(_line("a") + b"\n" + _line("b"))
    facts = scan(path)
    assert (facts.num_rows, facts.num_bytes) == (2, path.stat().st_size)
    rows = read_rows(path, facts)
    assert next(rows).custom_id == "a"
    path.write_bytes(b"")


def test_accepted_rows_survive_deep_stacks(tmp_path: Path) -> None:
    """A body that is read here is written and read again further down: there it must pass too."""
    for depth in range(50, sys.getrecursionlimit(), 50):
        nested: Any = b"[" * depth + b"]" * depth
        (item,) = _read(tmp_path, _line(body="@").replace(b'"@"', b'{"prompt": %b}' % nested))
        if isinstance(item, Row):
            body = item.body
            assert _deeper(300, lambda: json.loads(json.dumps({"body": body}))), f"depth {depth}"  # noqa: B023
        else:
            assert item.code == "invalid_json"


def _deeper(num_frames: int, call: Callable[[], Any]) -> Any:
    return call() if num_frames == 0 else _deeper(num_frames - 1, call)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
IDS = st.sampled_from(["a", "b", "line-1", "line-2", "line-3", "line-4", ""])
LIKELY_LINES = st.one_of(
    st.binary(max_size=40),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.builds(_line, IDS | VALUES),
    st.builds(lambda i, v: _line(i, body=v), IDS, VALUES),
)
FILES = st.binary(max_size=200) | st.lists(LIKELY_LINES, max_size=8).map(b"\n".join)


@given(FILES, st.sampled_from([1, 20, 100, 10_000]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, cap: int) -> None:
    """Nothing is raised but InputError for no rows; rows and ids come out exactly once."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    try:
        facts = scan(path, cap)
    except InputError:
        assert not data.removeprefix(b"\xef\xbb\xbf").strip()
        return
    items = list(read_rows(path, facts, cap))
    assert [item.index for item in items] == list(range(facts.num_rows))
    assert len(set(_ids(items))) == facts.num_rows
    json.dumps(_ids(items), ensure_ascii=False).encode("utf-8")
    for item in items:
        if isinstance(item, Row):
            json.dumps(item.body, allow_nan=False, ensure_ascii=False).encode("utf-8")
