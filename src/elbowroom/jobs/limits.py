"""Caps on one request: what it may ask of the engine, and the hosts it may fetch content from.

Values of a wrong type are left to vLLM, which answers them with status 400.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from elbowroom.core.options import option
from elbowroom.core.units import KIB, MIB
from elbowroom.jobs.strict_json import MAX_DEPTH, is_deep, load_any_json

_WHOLE_VOCABULARY = 10**9
_MAX_SHOWN = 10**18

_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
"""Characters in a URL that readers interpret differently: the host seen here may not be asked."""


_COUNTS = ("n", "best_of")
_STOPS = ("stop", "stop_token_ids", "bad_words")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_SCHEMAS = ("response_format", "structured_outputs", "tools")
_REGEXES = ("structured_outputs",)
_CAPPED = frozenset((*_COUNTS, *_STOPS, *_LOGPROBS, *_SCHEMAS, *_REGEXES))


LINES = "limit of a line"
limit = partial(option, group="limits of a row")


@dataclass(frozen=True)
class RowLimits:
    """Caps per row. None is no cap. ``n`` is the number of answers to one request.

    Sizes are bytes of UTF-8 JSON. ``allowed_url_hosts`` are host names without a port.
    """

    max_line_bytes: int = option(
        16 * MIB, "size", "longer ones are refused, and their ids not known", LINES
    )
    max_prompt_tokens: int | None = limit(None, "count", "of a prompt")
    max_n: int = limit(64, "count", "answers to a row (n, best_of)")
    max_stop: int = limit(32, "count", "stop strings, stop token ids, bad words")
    max_logprobs: int = limit(20, "count", "log-probabilities of a token")
    max_schema_bytes: int = limit(64 * KIB, "size", "of a JSON schema, or of all tools")
    max_regex_bytes: int = limit(4 * KIB, "size", "of a regular expression or grammar")
    max_row_seconds: float | None = limit(None, "seconds", "from offering a row to its answer")
    allowed_url_hosts: frozenset[str] = limit(
        frozenset(),
        "names",
        "content may be fetched from here (default: from nowhere)",
        flag="--allow-url-host",
        metavar="HOST",
    )


class Violation(NamedTuple):
    """Reason why a request is refused."""

    code: str
    message: str


def violation(body: dict[str, Any], limits: RowLimits) -> Violation | None:
    """The first limit that a request breaks, or None. Takes any JSON."""
    if not _CAPPED.isdisjoint(body):
        for name, value, most, flag in _sizes(body, limits):
            if value > most:
                message = f"{name} is {_shown(value)}, more than {most}: lower it, or raise {flag}"
                return Violation("limit_exceeded", message)
        for name, schema in (*schemas(body), *_structural_tags(body)):
            if isinstance(schema, str) and is_deep(_utf8(schema)):
                message = f"{name} is nested more than {MAX_DEPTH} deep: flatten it"
                return Violation("limit_exceeded", message)
    for url in _urls([body.get("messages"), body.get("input")]):  # embeddings take chats as input
        if (host := refused_host(url, limits.allowed_url_hosts)) is not None:
            message = f"content may not be fetched from {host}: use data:, or --allow-url-host HOST"
            return Violation("url_not_allowed", message)
    return None


def refused_host(url: str, allowed: frozenset[str]) -> str | None:
    """The host that a URL points at, or None if it is data in itself or on an allowed host.

    A URL whose host is not clear is returned itself, shortened.
    """
    if url.startswith("data:"):
        return None
    shown = repr(url if len(url) <= 60 else f"{url[:60]}...")
    try:
        parts = urlsplit(url)
        host = parts.hostname
        parts.port  # noqa: B018  a port that is no number raises
    except ValueError:
        return shown
    is_plain = parts.username is None and parts.password is None and not _UNSAFE.search(url)
    if (
        is_plain
        and parts.scheme in ("http", "https")
        and host in {name.lower() for name in allowed}
    ):
        return None
    return host if is_plain and host else shown


def schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """JSON schemas of a request, each with the name of its field."""
    if all(name not in body for name in _SCHEMAS):
        return
    response_format = _dict(body.get("response_format"))
    yield "response_format", _dict(response_format.get("json_schema")).get("schema")
    yield "structured_outputs.json", _dict(body.get("structured_outputs")).get("json")
    for tool in _list(body.get("tools")):
        yield "tools", _dict(_dict(tool).get("function")).get("parameters")


def regexes(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Regular expressions that constrain the answer, including those in schemas."""
    structured = _dict(body.get("structured_outputs"))
    fields = {
        "structured_outputs.regex": structured.get("regex"),
        "structured_outputs.whitespace_pattern": structured.get("whitespace_pattern"),
    }
    yield from ((name, value) for name, value in fields.items() if isinstance(value, str))
    for name, schema in (*schemas(body), *_structural_tags(body)):
        for key, value in _entries(_parsed(schema)):
            if key == "pattern" and isinstance(value, str):
                yield f"pattern in {name}", value
            if key == "patternProperties":
                yield from ((f"pattern in {name}", regex) for regex in _dict(value))


def _structural_tags(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Formats that hold schemas and regular expressions among other things."""
    response_format = _dict(body.get("response_format"))
    yield "response_format", [response_format.get("structures"), response_format.get("format")]
    yield "structured_outputs", _dict(body.get("structured_outputs")).get("structural_tag")


def _parsed(value: Any) -> Any:
    """A schema as data, parsed if it is given as text; None if it is not valid JSON."""
    return load_any_json(_utf8(value)) if isinstance(value, str) else value


def _sizes(body: dict[str, Any], limits: RowLimits) -> Iterator[tuple[str, int, int, str]]:
    """Name, value, cap and flag of everything that has a cap."""
    for name in _COUNTS:
        if isinstance(body.get(name), int):
            yield name, body[name], limits.max_n, "--max-n"
    for name in _STOPS:
        yield f"the number of {name}", len(_list(body.get(name))), limits.max_stop, "--max-stop"
    for name in _LOGPROBS:
        if isinstance(body.get(name), int):
            value = _WHOLE_VOCABULARY if body[name] == -1 else body[name]
            yield name, value, limits.max_logprobs, "--max-logprobs"
    for name in _SCHEMAS:
        if body.get(name):
            yield (
                f"size of {name}",
                _size(body[name]),
                limits.max_schema_bytes,
                "--max-schema-bytes",
            )
    for name, regex in regexes(body):
        yield f"size of {name}", _size(regex), limits.max_regex_bytes, "--max-regex-bytes"


def _urls(messages: Any) -> Iterator[str]:
    """Strings that a chat template or a loader of media may take for an address to fetch from."""
    for key, value in _entries(messages):
        if isinstance(value, str) and (key == "url" or key.endswith("_url")):
            yield value


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth."""
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            stack.extend(inner.values())
        elif isinstance(inner, list):
            stack.extend(inner)


def _size(value: Any) -> int:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return _MAX_SHOWN + 1
    return len(_utf8(text))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _shown(value: int) -> str:
    if value == _WHOLE_VOCABULARY:
        return "-1, the whole vocabulary"
    return str(value) if value <= _MAX_SHOWN else f"over {_MAX_SHOWN}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
