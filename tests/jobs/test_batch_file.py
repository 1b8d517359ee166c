"""Batch files as they come: whatever a line holds, it costs that line alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.jobs.batch_file import SUPPORTED_URLS, BatchFile, hash_id
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.rows import RejectedRow, Row
from elbowroom.jobs.strict_json import MAX_DEPTH
from tests.examples import examples
from tests.jobs.test_inputs import is_no_text

WriteFile = Callable[[bytes], Path]


def request(custom_id: object = "a", **changes: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {}}
    return json.dumps({**line, **changes}).encode()


def read(path: Path, **limits: int) -> list[Row | RejectedRow]:
    with BatchFile(path, RowLimits(**limits)) as batch:
        return list(batch.scan().rows())


def rejected(path: Path, **limits: int) -> RejectedRow:
    """The only row of the file, which must be refused."""
    (row,) = read(path, **limits)
    assert isinstance(row, RejectedRow)
    return row


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    def write_bytes(data: bytes) -> Path:
        path = tmp_path / "batch.jsonl"
        path.write_bytes(data)
        return path

    return write_bytes


def test_a_row_carries_what_its_line_says(write: WriteFile) -> None:
    body = {"prompt": "hé", "max_tokens": 3}
    line = request("x", body=body)
    (row,) = read(write(line))
    content_hash = int.from_bytes(blake2b(line, digest_size=8).digest(), "little")
    assert row == Row(0, 1, "x", "/v1/completions", body, content_hash)
    assert row.place == "line 1"


def test_every_supported_url_is_accepted(write: WriteFile) -> None:
    urls = sorted(SUPPORTED_URLS)
    rows = read(write(b"\n".join(request(url, url=url) for url in urls)))
    assert [row.url for row in rows if isinstance(row, Row)] == urls


def test_blank_lines_crlf_bom_and_a_missing_last_newline(write: WriteFile) -> None:
    path = write(
        b"\xef\xbb\xbf" + request("a") + b"\r\n\r\n  \n" + request("b") + b"\n" + request("c")
    )
    with BatchFile(path) as batch:
        assert batch.scan().num_rows == 3
        assert batch.num_bytes == path.stat().st_size
    rows = read(path)
    assert [(row.index, row.line_number, row.custom_id) for row in rows] == [
        (0, 1, "a"),
        (1, 4, "b"),
        (2, 5, "c"),
    ]
    assert all(isinstance(row, Row) for row in rows)


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        (b'{"custom_id": "a\xff"}', "invalid_utf8", "not UTF-8 at byte 16"),
        (b'{"custom_id": "\\ud83d"}', "invalid_utf8", "surrogate"),
        (b'{"custom_id": "a"', "invalid_json", "column 18"),
        (b"[" * 100_000, "invalid_json", f"more than {MAX_DEPTH} deep"),
        (b'{"body": NaN}', "invalid_json", "'NaN' is not finite"),
        (b'{"body": -Infinity}', "invalid_json", "'-Infinity' is not finite"),
        (b'{"body": 1e999}', "invalid_json", "'1e999' is not finite"),
        (b'{"body": ' + b"9" * 5000 + b"}", "invalid_json", "not valid JSON"),
        (b"[1]", "invalid_request", "not list"),
        (b"null", "invalid_request", "not NoneType"),
        (b"{}", "invalid_custom_id", "non-empty string"),
        (request(""), "invalid_custom_id", "non-empty string"),
        (request(7), "invalid_custom_id", "non-empty string"),
    ],
)
def test_a_line_without_an_id_is_rejected_under_a_made_up_one(
    write: WriteFile, line: bytes, code: str, part: str
) -> None:
    row = rejected(write(b"\n\n" + line))
    assert (row.index, row.line_number, row.custom_id, row.code) == (0, 3, "line-3", code)
    assert row.message.startswith("line 3: ")
    assert part in row.message


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"method": "GET"}, "invalid_method", "must be POST, not 'GET'"),
        ({"method": None}, "invalid_method", "must be POST, not None"),
        ({"url": "/v1/files"}, "invalid_url", "not '/v1/files'"),
        ({"url": ["/v1/completions"]}, "invalid_url", "must be one of"),
        ({"body": "text"}, "invalid_body", "JSON object"),
        ({"body": None}, "invalid_body", "JSON object"),
        ({"body": {"stream": True}}, "stream_unsupported", "remove it"),
    ],
)
def test_a_bad_request_is_rejected_under_its_own_id(
    write: WriteFile, changes: dict[str, Any], code: str, part: str
) -> None:
    row = rejected(write(request("mine", **changes)))
    assert (row.custom_id, row.code) == ("mine", code)
    assert row.message.startswith("line 1: ")
    assert part in row.message


def test_a_pair_of_surrogate_escapes_and_stream_false_are_fine(write: WriteFile) -> None:
    line = request("\N{GRINNING FACE}", body={"stream": False, "prompt": "\N{GRINNING FACE}"})
    assert b"\\ud83d" in line
    (row,) = read(write(line))
    assert isinstance(row, Row)
    assert row.body["prompt"] == "\N{GRINNING FACE}"


def test_a_line_over_the_cap_is_rejected_and_the_next_one_read(write: WriteFile) -> None:
    limit = len(request("b"))
    # The prefix of the BOM must not make the rest of a long line look like a line of its own.
    path = write(b"\xef\xbb\xbf" + b"x" * (limit * 3) + b"\n" + request("b") + b"\n")
    first, second = read(path, max_line_bytes=limit)
    assert isinstance(first, RejectedRow)
    assert (first.code, first.custom_id) == ("line_too_long", "line-1")
    assert f"longer than {limit} bytes" in first.message
    assert isinstance(second, Row)
    assert second.line_number == 2


def test_a_long_last_line_without_newline_is_one_row(write: WriteFile) -> None:
    assert rejected(write(b"x" * 5000), max_line_bytes=64).code == "line_too_long"


def test_the_first_of_equal_ids_is_answered_and_the_others_are_named(write: WriteFile) -> None:
    path = write(b"\n".join([request("a"), request("b"), request("a"), request("a")]))
    rows = read(path)
    assert [row.custom_id for row in rows] == ["a", "b", "line-3", "line-4"]
    assert [isinstance(row, Row) for row in rows] == [True, True, False, False]
    duplicate = rows[2]
    assert isinstance(duplicate, RejectedRow)
    assert duplicate.code == "duplicate_custom_id"
    assert "line 3: 'a' is used by an earlier line" in duplicate.message


def test_an_id_is_spent_even_if_its_first_line_is_rejected(write: WriteFile) -> None:
    rows = read(write(request("a", method="GET") + b"\n" + request("a")))
    assert [(row.custom_id, isinstance(row, Row)) for row in rows] == [
        ("a", False),
        ("line-2", False),
    ]


@pytest.mark.parametrize("real_id", ["line-1", "line-2", "line--2", "line---"])
def test_a_made_up_id_is_never_one_of_the_file(write: WriteFile, real_id: str) -> None:
    made_up, real = read(write(b"broken\n" + request(real_id)))
    assert isinstance(real, Row)
    assert real.custom_id == real_id
    assert made_up.custom_id.startswith("line-")
    assert made_up.custom_id.strip("line-") == "1"
    assert not real_id.startswith(made_up.custom_id[:-1])


def test_messages_stay_short_whatever_the_line_holds(write: WriteFile) -> None:
    long = "x" * 1_000_000
    assert len(rejected(write(request(method=long))).message) < 300
    assert len(rejected(write(request(url=long))).message) < 300
    _, duplicate = read(write(request(long) + b"\n" + request(long)))
    assert isinstance(duplicate, RejectedRow)
    assert len(duplicate.message) < 300


def test_rows_are_read_in_any_order(write: WriteFile) -> None:
    path = write(b"\xef\xbb\xbf" + b"\r\n".join([request("a"), b"", request("b"), request("a")]))
    with BatchFile(path) as batch:
        batch.scan()
        assert [row.custom_id for row in batch.rows([1, 2, 0])] == ["b", "line-4", "a"]
        assert batch.id_hashes().tolist() == [hash_id(name) for name in ("a", "b", "line-4")]


def test_rows_are_found_by_what_their_line_says(write: WriteFile) -> None:
    with BatchFile(write(b"\n".join([request("a"), b"{", request("b"), b"{"]))) as batch:
        row = batch.scan().read(2)
        assert isinstance(row, Row)
        broken = int.from_bytes(blake2b(b"{", digest_size=8).digest(), "little")
        hashes = np.array([row.content_hash, 7, broken], np.uint64)
        assert batch.find(hashes).tolist() == [2, -1, 1]


def test_every_row_is_shown_in_turn(write: WriteFile) -> None:
    seen: list[Row | RejectedRow] = []
    lines = [request("a"), request("a"), request("b", body=[]), b"{"]
    with BatchFile(write(b"\n".join(lines))) as batch:
        batch.scan(seen.append)
        assert batch.duplicates() == [1]
        assert seen[0] == batch.read(0)
        assert [row.index for row in seen] == [0, 1, 2, 3]
        assert [isinstance(row, Row) for row in seen] == [True, True, False, False]
        assert [row.code for row in seen if isinstance(row, RejectedRow)] == [
            "invalid_body",
            "invalid_json",
        ]


def test_a_line_that_breaks_a_limit_is_rejected(write: WriteFile) -> None:
    row = rejected(write(b"\n" + request("mine", body={"n": 65})))
    assert (row.custom_id, row.code) == ("mine", "limit_exceeded")
    assert row.message.startswith("line 2: ")
    assert isinstance(read(write(request(body={"n": 65})), max_n=65)[0], Row)


@pytest.mark.parametrize("now", [b"", request("x"), request("b") + b" " + request("b")])
def test_a_line_that_changes_meanwhile_is_an_error(write: WriteFile, now: bytes) -> None:
    with BatchFile(write(request("a") + b"\n" + request("b"))) as batch:
        batch.scan()
        write(request("a") + b"\n" + now)
        assert batch.read(0).custom_id == "a"
        with pytest.raises(InputError, match=r"changed while it was read \(line 2\): restore it"):
            batch.read(1)


def test_a_file_that_is_replaced_meanwhile_is_read_on(write: WriteFile, tmp_path: Path) -> None:
    path = write(request("a"))
    with BatchFile(path) as batch:
        batch.scan()
        (tmp_path / "new").write_bytes(b"something else")
        (tmp_path / "new").replace(path)
        assert batch.read(0).custom_id == "a"


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_refused(write: WriteFile, data: bytes) -> None:
    with pytest.raises(InputError, match="no rows: give one JSON request per line"):
        read(write(data))


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file.*Check its name"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="is a folder: name the files in it"):
        read(tmp_path)


def test_a_file_without_permission_is_refused(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(request())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        read(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)
lines = st.one_of(
    st.binary(max_size=40),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.builds(
        request,
        st.sampled_from(["a", "b", "line-1", "line-2", "line--1", "", None, "\ud800"]),
        method=st.sampled_from(["POST", "GET"]),
        url=st.sampled_from(["/v1/completions", "/v1/files"]),
        body=json_values | st.just({}),
    ),
)


@given(
    st.binary(max_size=200) | st.lists(lines, max_size=8).map(b"\n".join),
    st.sampled_from([30, 999]),
)
@examples(400, suppress_health_check=list(HealthCheck))
def test_any_bytes_give_each_row_once(tmp_path: Path, data: bytes, max_line_bytes: int) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_bytes(data)
    assume(not is_no_text(data))
    with BatchFile(path, RowLimits(max_line_bytes=max_line_bytes)) as batch:
        try:
            batch.scan()
        except InputError:
            assert not data.replace(b"\xef\xbb\xbf", b"").strip()
            return
        rows = list(batch.rows())
        assert [row.index for row in rows] == list(range(batch.num_rows))
        assert len({row.custom_id for row in rows}) == batch.num_rows
        assert batch.id_hashes().tolist() == [hash_id(row.custom_id) for row in rows]
    for row in rows:
        json.dumps(
            [row.custom_id, row.body] if isinstance(row, Row) else row.message, allow_nan=False
        )
        row.custom_id.encode()
