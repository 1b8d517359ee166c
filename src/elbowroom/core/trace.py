"""Simulated and measured timelines in Chrome's trace format, which Perfetto opens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from elbowroom.core.errors import OutputError


class Span(NamedTuple):
    """An interval from ``start`` to ``end`` seconds, on one track of one process."""

    process: str
    track: str
    name: str
    start: float
    end: float
    details: dict[str, Any] = {}  # noqa: RUF012


class Count(NamedTuple):
    """A value at the time ``at`` (seconds), drawn as a curve."""

    process: str
    name: str
    at: float
    value: float


def write_trace(path: Path, events: Iterable[Span | Count]) -> None:
    """Write complete ("X") and counter ("C") events, in microseconds. Raises OutputError."""
    numbers: dict[tuple[str, ...], int] = {}
    named: list[dict[str, Any]] = []

    def number(kind: str, *names: str) -> int:
        if names not in numbers:
            numbers[names] = len(numbers) + 1
            pid = numbers[names[:1]]
            about = {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": numbers[names]}
            named.append({**about, "args": {"name": names[-1]}})
        return numbers[names]

    drawn = []
    for event in events:
        pid = number("process", event.process)
        if isinstance(event, Count):
            args: dict[str, Any] = {event.name: event.value}
            drawn.append({"ph": "C", "name": event.name, "pid": pid, "ts": event.at * 1e6})
        else:
            tid = number("thread", event.process, event.track)
            times = {"ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6}
            drawn.append({"ph": "X", "name": event.name, "pid": pid, "tid": tid, **times})
            args = event.details
        if args:
            drawn[-1]["args"] = args
    try:
        path.write_text(json.dumps({"traceEvents": named + drawn, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise OutputError(f"cannot write the trace to {path}: {error.strerror}") from error
