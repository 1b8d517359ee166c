"""Parquet files: columns that make requests, results as tables, kills in between."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.journal_reader import JournalReader
from elbowroom.jobs.parquet_input import read_lines
from elbowroom.jobs.parquet_results import COLUMNS, table_ids, table_parts
from elbowroom.jobs.results import error_line, response_line
from elbowroom.jobs.rows import RejectedRow, Row
from elbowroom.jobs.verify import verify_results
from tests.examples import examples
from tests.jobs.plans import write_batch

pa = pytest.importorskip("pyarrow", reason="pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")

ROOT = Path(__file__).parents[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), min_size=1, max_size=4)


def write_table(path: Path, rows: list[dict[str, Any]], **kinds: Any) -> Path:
    """A table of rows. Columns have the types that Arrow finds, or ``kinds``."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table({name: pa.array(columns[name], kinds.get(name)) for name in names})
    pq.write_table(table, path, row_group_size=2)
    return path


def rows_of(*paths: Path) -> list[Row | RejectedRow]:
    with BatchInput(paths) as source, BatchFile(source) as batch:
        return list(batch.scan().rows())


def requests_of(*paths: Path) -> list[tuple[str, str, dict[str, Any]]]:
    rows = [row for row in rows_of(*paths) if isinstance(row, Row)]
    return [(row.custom_id, row.url, row.body) for row in rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.parquet"


def test_the_columns_of_a_batch_file(path: Path, tmp_path: Path) -> None:
    plain = write_batch(tmp_path / "in.jsonl", 5)
    given = [json.loads(line) for line in plain.read_text().splitlines()]
    as_rows = rows_of(plain)
    write_table(path, given)
    assert [row.meaning_hash for row in rows_of(path)] == [row.meaning_hash for row in as_rows]
    write_table(path, [{**row, "body": json.dumps(row["body"])} for row in given])
    assert requests_of(path) == requests_of(plain), "bodies as JSON text"


def test_what_a_row_has_not_is_left_out(path: Path) -> None:
    """A struct has the fields of all rows. What is in a map, or JSON text, is there."""
    tool = {"role": "tool", "content": "7", "tool_call_id": "a"}
    write_table(
        path,
        [
            {"custom_id": "a", "messages": HELLO, "max_tokens": None, "logit_bias": [("5", 1.0)]},
            {"custom_id": "b", "messages": [tool], "max_tokens": 8, "logit_bias": None},
            {"custom_id": "c", "messages": [], "max_tokens": None, "logit_bias": []},
        ],
        logit_bias=pa.map_(pa.string(), pa.float64()),
    )
    assert requests_of(path) == [
        ("a", CHAT, {"messages": HELLO, "logit_bias": {"5": 1.0}}),
        ("b", CHAT, {"messages": [tool], "max_tokens": 8}),
        ("c", CHAT, {"messages": [], "logit_bias": {}}),
    ]
    text = '{"prompt": "x",\n "stop": null, "seed": 1.0, "seed": 2}'
    write_table(path, [{"custom_id": "a", "body": text}])
    assert requests_of(path) == [("a", COMPLETIONS, {"prompt": "x", "stop": None, "seed": 2})]


def test_a_row_that_is_no_request_fails_alone(path: Path, tmp_path: Path) -> None:
    good = {"custom_id": "a", "method": None, "url": None, "body": '{"prompt": "x"}'}
    bad = [
        {"custom_id": None},
        {"method": "GET"},
        {"url": "/v1/files"},
        {"body": '{"input": "of which endpoint?"}'},
        {"body": '{"prompt": "x"}, "custom_id": "another"'},
        {"body": "[1]"},
        {"body": '{"prompt": "a\nb"}'},
        {"body": '{"temperature": NaN}', "url": CHAT},
        {"body": None},
        {},
    ]
    rows = [{**good, "custom_id": f"{at}", **row} for at, row in enumerate(bad, start=1)]
    write_table(path, [*rows, {**good, "custom_id": "10"}])
    found = rows_of(path)
    ids = ["line-1", *(f"{at}" for at in range(2, 11)), "line-11"]
    assert [row.custom_id for row in found] == ids
    rejected = [row for row in found if isinstance(row, RejectedRow)]
    faults = ["custom_id", "method", "url", "url", "body", "body", "body", "json", "body"]
    codes = [*(f"invalid_{fault}" for fault in faults), "duplicate_custom_id"]
    assert [row.code for row in rejected] == codes
    assert rejected[1].message.startswith("row 2: ")
    plain = write_batch(tmp_path / "in.jsonl", 2)
    mixed = rows_of(plain, path)
    assert [row.custom_id for row in mixed[:3]] == ["id-0", "id-1", "line-3"]
    assert isinstance(mixed[2], RejectedRow)
    assert mixed[2].message.startswith(f"{path}, row 1: ")


@examples(200)
@given(BODIES, st.sampled_from([None, 0, 1]))
def test_json_text_is_read_as_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "in.parquet"
    texts = [json.dumps(body, indent=indent, ensure_ascii=indent is None) for body in bodies]
    write_table(
        path,
        [{"custom_id": f"{n}", "url": "/v1/score", "body": text} for n, text in enumerate(texts)],
    )
    lines = b"".join(read_lines(path)).split(b"\n")
    assert [json.loads(line)["body"] for line in lines[:-1]] == bodies


@examples(1000)
@given(st.text() | st.builds('{{"prompt": "x"{}'.format, st.text('"},:[]{ab\\\n')))
def test_no_text_is_more_than_a_body(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "in.parquet"
    write_table(path, [{"custom_id": "a", "body": text}, {"custom_id": "b", "body": "{}"}])
    assert [row.custom_id for row in rows_of(path)] == ["a", "b"]


def test_columns_that_dataframes_bring(path: Path) -> None:
    rows = [{"custom_id": "a", "prompt": "x", "max_tokens": 8.0, "__index_level_0__": 7}]
    write_table(path, rows, custom_id=pa.dictionary(pa.int32(), pa.string()))
    assert requests_of(path) == [("a", COMPLETIONS, {"prompt": "x", "max_tokens": 8.0})]
    rows = [{"custom_id": "a", "url": "/v1/embeddings", "input": ["x", "y"]}]
    write_table(path, rows, input=pa.large_list(pa.large_string()))
    assert requests_of(path) == [("a", "/v1/embeddings", {"input": ["x", "y"]})]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, "custom_id"),
        ({"custom_id": 7, "prompt": "x"}, "int64 in column 'custom_id'"),
        ({"custom_id": "a"}, "no column 'body'"),
        ({"custom_id": "a", "input": "x"}, "no column 'body'"),
        ({"custom_id": "a", "prompt": "x", "label": 1}, "label"),
        ({"custom_id": "a", "prompt": "x", "messages": HELLO}, "prompt"),
        ({"custom_id": "a", "body": {"prompt": "x"}, "max_tokens": 1}, "max_tokens"),
        ({"custom_id": "a", "messages": json.dumps(HELLO)}, "messages"),
        ({"custom_id": "a", "body": {"input": [b"x"]}}, r"binary in 'body.input\[\]'"),
    ],
)
def test_columns_that_no_request_has(path: Path, row: dict[str, Any], words: str) -> None:
    write_table(path, [row])
    with pytest.raises(InputError, match=words):
        BatchInput([path])


def test_files_that_are_no_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(path, [{"custom_id": f"{n}", "prompt": "x" * n} for n in range(100)])
    whole = path.read_bytes()
    for data in (b"{}\n", b"", whole[:50], whole[:-8], whole[:4] + b"?" * 99 + whole[103:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"in\.parquet"):
            BatchInput([path])
    path.write_bytes(whole)
    other = path.rename(path.with_name("in"))
    with pytest.raises(InputError, match=r"name it \.parquet"):
        BatchInput([other])
    other.rename(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        BatchInput([path])


def table_of(path: Path, *lines: bytes) -> list[dict[str, Any]]:
    path.write_bytes(b"".join(table_parts(path, iter(lines))))
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_results_as_a_table(path: Path) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    choice = {"message": {"content": "hi \ud83d"}, "finish_reason": "stop"}
    parts = [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}]
    chat, embedding = {"choices": [choice], "usage": usage}, {"data": [{"embedding": [0.5]}]}
    rows = table_of(
        path,
        response_line("chat", 200, chat),
        response_line("completion", 200, {"choices": [{"text": "x", "finish_reason": "length"}]}),
        response_line("response", 200, {"output": [{"type": "message", "content": parts}]}),
        response_line("embedding", 200, embedding),
        response_line("refused", 400, "no JSON object"),
        error_line("lost", "engine_crashed", "twice"),
    )
    assert all(list(row) == list(COLUMNS) for row in rows)
    assert [row["custom_id"] for row in rows] == list(table_ids(path))
    assert [row["text"] for row in rows] == ["hi \ufffd", "x", "ab", None, None, None]
    assert [row["status_code"] for row in rows] == [200, 200, 200, 200, 400, None]
    assert [row["finish_reason"] for row in rows[:3]] == ["stop", "length", None]
    assert (rows[0]["prompt_tokens"], rows[0]["completion_tokens"]) == (3, 2)
    assert json.loads(rows[0]["response"]) == chat
    assert json.loads(rows[3]["response"]) == embedding
    assert (rows[5]["response"], json.loads(rows[5]["error"])["code"]) == (None, "engine_crashed")
    assert table_of(path) == [], "without rows there are the columns"
    assert [field.name for field in pq.read_schema(path)] == list(COLUMNS)


def test_verify_of_tables(path: Path, tmp_path: Path) -> None:
    write_table(path, [{"custom_id": f"{n}", "prompt": "x"} for n in range(3)])
    output, errors = tmp_path / "out.parquet", tmp_path / "out.errors.jsonl"
    table_of(output, *(response_line(name, 200, {}) for name in ("0", "1", "1", "new")))
    errors.write_bytes(error_line("0", "x", "y"))
    with BatchFile(path) as batch:
        found = verify_results(batch.scan(), [output, errors])
        assert (found.missing, set(found.repeated)) == (("2",), {"0", "1"})
        assert found.unknown == ("new",)
        with pytest.raises(InputError, match="it holds no results"):
            verify_results(batch, [path])
        write_table(output, [{"custom_id": "0", "response": None, "error": None}])
        with pytest.raises(InputError, match="row 1"):
            verify_results(batch, [output])


def test_a_killed_job_answers_each_row_once(tmp_path: Path) -> None:
    given = write_batch(tmp_path / "in.jsonl", 400).read_text().splitlines()
    write_table(tmp_path / "in.parquet", [json.loads(line) for line in given])
    for name in ("run", "pids"):
        (tmp_path / name).mkdir()
    (tmp_path / "answered").touch()
    options = ("2", "--latency", "0.06", "--anonymous")
    command = [sys.executable, "-m", "tests.jobs.stub_job", str(tmp_path), *options]
    for num_safe in (60, 200):
        job = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        while num_finished(tmp_path) < num_safe and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert num_finished(tmp_path) >= num_safe
        names = sorted(each.name for each in tmp_path.glob("*parquet*"))
        assert names == ["in.parquet", "out.parquet.elbowroom"], "the copy has no name"
    num_before = num_finished(tmp_path)
    answered = (tmp_path / "answered").stat().st_size
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["custom_id"] for row in rows] == [f"id-{n}" for n in range(400)]
    texts = [json.loads(row["response"])["text"] for row in rows]
    assert texts == [f"say {n}" for n in range(400)]
    with (tmp_path / "answered").open() as log:
        log.seek(answered)
        assert len(log.read().split()) <= 400 - num_before + 16, "but for rows in flight"


def num_finished(folder: Path) -> int:
    try:
        with JournalReader(folder / "out.parquet") as journal:
            return journal.totals().num_finished
    except InputError:
        return 0
