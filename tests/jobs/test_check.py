"""What is told of a batch file before a device is touched."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from elbowroom.core.errors import InputError
from elbowroom.jobs.check import CheckReport, check_file, print_report
from elbowroom.jobs.limits import RowLimits

DEMO = Path(__file__).parents[2] / "examples" / "demo"


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def check(
    folder: Path, *lines: str, model: Path | None = None, length: int | None = None
) -> CheckReport:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines))
    return check_file(path, model, length, RowLimits())


def codes(report: CheckReport) -> list[tuple[int, str]]:
    return [(problem.line_number, problem.code) for problem in report.problems]


def test_rows_and_tokens_of_a_good_file() -> None:
    from transformers import AutoTokenizer

    report = check_file(DEMO / "requests.jsonl", DEMO / "model", None, RowLimits())
    assert (report.num_rows, report.num_problems) == (500, 0)
    assert report.summary.urls == {"/v1/chat/completions": 500}
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    rows = [json.loads(text)["body"] for text in (DEMO / "requests.jsonl").open()]
    lengths = [
        len(
            tokenizer.apply_chat_template(
                row["messages"], add_generation_prompt=True, return_dict=False
            )
        )
        for row in rows
    ]
    assert report.prompt_tokens == sum(lengths) == 12_400, "as vLLM reports"
    assert sum(report.prompt_lengths.values()) == 500
    assert all(length <= max(report.prompt_lengths) for length in lengths)
    assert report.output_token_limit == sum(row["max_tokens"] for row in rows)
    json.dumps(report.to_json())


def test_every_kind_of_bad_row_is_told_with_its_line(tmp_path: Path) -> None:
    report = check(
        tmp_path,
        line("a", prompt="x"),
        "{",
        line("a", prompt="y"),
        "",
        line("b", url="/v1/files"),
        line("c", n=1000),
        line("d", response_format={"json_schema": {"schema": {"type": "nonsense"}}}),
        line("e", structured_outputs={"regex": "(["}),
        line("f", structured_outputs={"json": "{not json"}),
        line("g", tools=[{"function": {"parameters": {"properties": {"x": {"pattern": "*"}}}}}]),
    )
    assert codes(report) == [
        (2, "invalid_json"),
        (3, "duplicate_custom_id"),
        (5, "invalid_url"),
        (6, "limit_exceeded"),
        (7, "invalid_schema"),
        (8, "invalid_schema"),
        (9, "invalid_schema"),
        (10, "invalid_schema"),
    ]
    assert report.num_rows == 9
    assert report.num_problems == sum(report.problem_counts.values()) == 8
    assert report.prompt_tokens is None


def test_each_bad_line_is_one_problem_under_the_id_that_it_has_in_the_results(
    tmp_path: Path,
) -> None:
    """Also one that cannot be read, and whose id an earlier line uses."""
    broken = '{"custom_id": "a", "x": NaN}'
    report = check(tmp_path, line("a", prompt="x"), broken, line("a", url="/v1/files"), broken, "{")
    found = [(problem.custom_id, problem.code) for problem in report.problems]
    assert found == [
        ("line-2", "invalid_json"),
        ("line-3", "duplicate_custom_id"),
        ("line-4", "invalid_json"),
        ("line-5", "invalid_json"),
    ]
    assert (report.num_rows, report.num_problems) == (5, 4)


def test_prompts_of_every_kind_are_counted(tmp_path: Path) -> None:
    chat = {"url": "/v1/chat/completions"}
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    report = check(
        tmp_path,
        line("one", prompt="12"),
        line("some", prompt=["1", "2 3"]),
        line("ids", prompt=[1, 2, 3]),
        line("lists of ids", prompt=[[1], [2, 3]]),
        line("embed", url="/v1/embeddings", input="1"),
        line("chat", **chat, messages=[{"role": "user", "content": "1\n2"}]),
        line("parts", **chat, messages=[{"role": "user", "content": parts}]),
        line("template fails", **chat, messages=[{"role": "user"}], chat_template="{{ 1 / 0 }}"),
        line("no list", **chat, messages=7),
        model=DEMO / "model",
    )
    assert codes(report) == [(8, "template_error"), (9, "template_error")]
    assert sum(report.prompt_lengths.values()) == 9
    assert report.num_unlimited == 4, "completions have 16 tokens unless they say otherwise"


def test_prompts_that_do_not_fit(tmp_path: Path) -> None:
    lines = [line(str(n), prompt=[1] * n, max_tokens=7, n=2) for n in (9, 10)]
    report = check(tmp_path, *lines, model=DEMO / "model", length=10)
    assert codes(report) == [(2, "prompt_too_long")]
    assert "has 10 tokens, at most 9 fit" in report.problems[0].message
    assert report.output_token_limit == 28
    own = check(tmp_path, line("a", prompt=[1] * 10**5), model=DEMO / "model")
    assert codes(own) == [(1, "prompt_too_long")], "the model's own length"


def test_what_fits_depends_on_what_is_asked(tmp_path: Path) -> None:
    report = check(
        tmp_path,
        line("embedding", url="/v1/embeddings", input=[1] * 10),
        line("longer", url="/v1/embeddings", input=[1] * 11),
        line("cut", prompt=[1] * 20, truncate_prompt_tokens=4, max_tokens=1),
        line("too many", prompt=[1], max_tokens=11),
        model=DEMO / "model",
        length=10,
    )
    assert codes(report) == [(2, "prompt_too_long"), (4, "max_tokens")]
    assert report.prompt_tokens == 10 + 11 + 4 + 1


def test_many_problems_are_counted_and_some_are_kept(tmp_path: Path) -> None:
    report = check(tmp_path, *["{"] * 1500)
    assert (report.num_problems, len(report.problems)) == (1500, 1000)
    stream = io.StringIO()
    print_report(Console(file=stream, width=120), report)
    shown = stream.getvalue()
    assert "line 20: " in shown
    assert "line 21: " not in shown
    assert "... and 1480 more" in shown


def test_a_model_that_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        check(tmp_path, line("a", prompt="x"), model=tmp_path)


def test_the_screen_shows_lengths(tmp_path: Path) -> None:
    lines = [line(str(n), prompt=[1] * (n + 1)) for n in range(8)]
    report = check(tmp_path, *lines, model=DEMO / "model")
    assert report.prompt_lengths == {1: 1, 2: 1, 4: 2, 8: 4}
    stream = io.StringIO()
    print_report(Console(file=stream, width=120), report)
    assert f"up to        8 {'#' * 40} 4" in stream.getvalue()
