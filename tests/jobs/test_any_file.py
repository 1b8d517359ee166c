"""Files as they come, through whole jobs: each row exactly once, whatever its line holds."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from elbowroom.core.errors import InputError
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.job import Job, JobFiles, JobOptions
from elbowroom.jobs.limits import RowLimits
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from elbowroom.jobs.scan import scanned
from elbowroom.jobs.verify import verify_results
from tests.examples import examples
from tests.jobs.plans import lengths_of, make_plan
from tests.jobs.test_inputs import is_no_text

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "model"
STUB = [sys.executable, "-m", "tests.jobs.stub_replica"]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(folder: Path, restart: bool = False) -> JobReport:
    files = JobFiles(*(folder / name for name in ("out", "err", "report")))
    options = JobOptions(restart=restart)
    with scanned(folder / "in", options) as rows:
        job = Job(make_plan(1, max_num_seqs=64), rows, files, {}, options)
        return asyncio.run(asyncio.wait_for(run_job(job, STUB), 120))


def request(custom_id: object, prompt: object = "x", **changes: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions"}
    return json.dumps({**line, "body": {"prompt": prompt}, **changes}).encode()


def errors(folder: Path) -> dict[str, str]:
    """Codes of failed rows by the number that their message gives."""
    lines = [json.loads(line) for line in (folder / "err").read_bytes().splitlines()]
    return {line["error"]["message"].split(":")[0]: line["error"]["code"] for line in lines}


def test_lines_as_they_are_seen_in_the_wild(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + request("bom"),
        request("crlf") + b"\r",
        b"",
        b"  \t ",
        request("10 MB", "x" * 10_000_000),
        request("17 MB", "x" * 17_000_000),
        b'{"custom_id": "utf8", "\xff": 1}',
        b'{"custom_id": "deep", "body": ' + b"[" * 100_000,
        request("nul", "a\0b"),
        b'{"custom_id": "raw nul\0"}',
        b"\0\0\0",
        request("stream", body={"stream": True}),
        request("bom"),
        request("last"),
    ]
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    report = run(tmp_path)
    assert (report.num_rows, report.num_succeeded) == (12, 5)
    answered = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [line["custom_id"] for line in answered] == ["bom", "crlf", "10 MB", "nul", "last"]
    assert answered[3]["response"]["body"]["text"] == "a\0b"
    assert errors(tmp_path) == {
        "line 6": "line_too_long",
        "line 7": "invalid_utf8",
        "line 8": "invalid_json",
        "line 10": "invalid_json",
        "line 11": "invalid_json",
        "line 12": "stream_unsupported",
        "line 13": "duplicate_custom_id",
    }


def test_a_large_file_with_one_bad_row_in_a_hundred(tmp_path: Path) -> None:
    bad = [b"{", b"\xff", request("", ""), request("x", url="/v1/files"), request("id-0")]
    with (tmp_path / "in").open("wb") as file:
        for index in range(20_000):
            is_bad = index % 100 == 99
            line = bad[index // 100 % 5] if is_bad else request(f"id-{index}")
            file.write(line + (b"\r\n" if index % 3 else b"\n"))
    report = run(tmp_path)
    assert (report.num_succeeded, report.num_failed) == (19_800, 200)
    assert set(errors(tmp_path)) == {f"line {number}" for number in range(100, 20_001, 100)}
    with BatchFile(tmp_path / "in") as batch:
        assert verify_results(batch.scan(), [tmp_path / "out", tmp_path / "err"]).is_good


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)
fields = ("prompt", "messages", "input", "n", "max_tokens", "stop", "tools", "response_format")
bodies = st.dictionaries(st.sampled_from(fields), json_values, max_size=4)
lines = st.one_of(
    st.binary(max_size=40),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.builds(request, st.sampled_from(["a", "b", "line-1", "line--2", "", None, "\ud800"])),
    st.builds(request, st.text(max_size=3), body=bodies),
)


@given(st.lists(lines, min_size=1, max_size=12).map(b"\n".join), st.randoms(use_true_random=False))
@examples(40, suppress_health_check=list(HealthCheck))
def test_any_file_gives_each_row_once_also_in_two_runs(
    tmp_path: Path, data: bytes, chance: Any
) -> None:
    """The first run sees only the beginning, cut anywhere, as while the file is written."""
    for part, restart in ((data[: chance.randrange(len(data) + 1)], True), (data, False)):
        (tmp_path / "in").write_bytes(part)
        for name in ("out", "err"):
            (tmp_path / name).unlink(missing_ok=True)
        try:
            report = run(tmp_path, restart)
        except InputError as error:
            if "has no rows" in str(error):
                assert not part.removeprefix(b"\xef\xbb\xbf").strip()
            elif not is_no_text(part):  # the row that was cut was a row all the same
                assert "is gone or changed" in str(error)
            continue
        with BatchFile(tmp_path / "in") as batch:
            paths = [path for path in (tmp_path / "out", tmp_path / "err") if path.exists()]
            assert verify_results(batch.scan(), paths).is_good
        assert report.num_succeeded + report.num_failed == report.num_rows


@given(st.lists(lines, min_size=1, max_size=12).map(b"\n".join), st.sampled_from([None, 3]))
@examples(200, suppress_health_check=list(HealthCheck))
def test_any_file_has_lengths_or_is_refused(
    tmp_path: Path, data: bytes, max_rows: int | None
) -> None:
    """What a prediction is made of must not end a run."""
    (tmp_path / "in").write_bytes(data)
    try:
        lengths = lengths_of(tmp_path / "in", DEMO, max_rows=max_rows)
    except InputError as error:
        assert "no row" in str(error) or is_no_text(data)
        return
    assert lengths.workload.num_rows >= 1
    assert int(lengths.workload.prompt_tokens.min()) >= 1


def test_rows_that_ask_for_too_much_are_counted_all_the_same(tmp_path: Path) -> None:
    body = {"prompt": "8" * 150_000, "n": 2**31 - 1, "max_tokens": 2**31 - 1}
    (tmp_path / "in").write_bytes(request("a", body=body))
    lengths = lengths_of(tmp_path / "in", DEMO, RowLimits(max_n=2**31)).workload
    assert lengths.num_rows == 128
    assert int(lengths.prompt_tokens[0]) == pytest.approx(150_000, rel=0.01)
