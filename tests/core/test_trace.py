"""Traces: what Chrome's format asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elbowroom.core.errors import OutputError
from elbowroom.core.trace import Count, Span, write_trace


def test_spans_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    spans = [Span("a", "x", "one", 1.0, 1.5, {"rows": 3}), Span("a", "y", "two", 2.0, 3.0)]
    write_trace(path, [*spans, Count("b", "rows", 2.0, 7)])
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    one, two, count = [event for event in events if event["ph"] != "M"]
    assert (one["ts"], one["dur"], one["args"]) == (1e6, 0.5e6, {"rows": 3})
    assert names["process_name", one["pid"], one["pid"]] == "a"
    assert names["thread_name", one["pid"], one["tid"]] == "x"
    assert names["thread_name", two["pid"], two["tid"]] == "y"
    assert (count["ph"], count["args"], names["process_name", count["pid"], count["pid"]]) == (
        "C",
        {"rows": 7},
        "b",
    )


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the trace"):
        write_trace(tmp_path / "no" / "t.json", [])
