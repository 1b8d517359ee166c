"""Limits: what one request may ask for, and from where."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.jobs.limits import RowLimits, refused_host, violation


def broken(body: dict[str, Any], **limits: Any) -> str | None:
    found = violation(body, RowLimits(**limits))
    return found and found.code


LARGE = {"type": "object", "title": "x" * 70_000}
LONG = "a" * 5_000


@pytest.mark.parametrize(
    ("body", "flag"),
    [
        ({"n": 65}, "--max-n"),
        ({"best_of": 10**30}, "--max-n"),
        ({"stop": ["x"] * 33}, "--max-stop"),
        ({"stop_token_ids": [1] * 33}, "--max-stop"),
        ({"bad_words": ["x"] * 33}, "--max-stop"),
        ({"logprobs": 21}, "--max-logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "--max-logprobs"),
        ({"prompt_logprobs": -1}, "--max-logprobs"),
        ({"response_format": {"json_schema": {"schema": LARGE}}}, "--max-schema-bytes"),
        ({"structured_outputs": {"json": LARGE}}, "--max-schema-bytes"),
        ({"structured_outputs": {"grammar": "x" * 70_000}}, "--max-schema-bytes"),
        ({"tools": [{"function": {"parameters": LARGE}}]}, "--max-schema-bytes"),
        ({"structured_outputs": {"regex": LONG}}, "--max-regex-bytes"),
        ({"response_format": {"json_schema": {"schema": {"pattern": LONG}}}}, "--max-regex-bytes"),
        (
            {"tools": [{"function": {"parameters": {"properties": {"a": {"pattern": LONG}}}}}]},
            "--max-regex-bytes",
        ),
        ({"structured_outputs": {"json": json.dumps({"pattern": LONG})}}, "--max-regex-bytes"),
        ({"structured_outputs": {"structural_tag": json.dumps({"pattern": LONG})}}, "--max-regex"),
        ({"structured_outputs": {"json": {"patternProperties": {LONG: {}}}}}, "--max-regex-bytes"),
        ({"response_format": {"format": {"type": "regex", "pattern": LONG}}}, "--max-regex-bytes"),
        ({"response_format": {"structures": [{"schema": {"pattern": LONG}}]}}, "--max-regex-bytes"),
        ({"structured_outputs": {"whitespace_pattern": LONG}}, "--max-regex-bytes"),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "--max-schema-bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_too_much_names_its_flag(body: dict[str, Any], flag: str) -> None:
    found = violation(body, RowLimits())
    assert found is not None
    assert found.code == "limit_exceeded"
    assert flag in found.message
    assert len(found.message) < 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 64, "stop": ["x"] * 32, "logprobs": 20},
        {"n": "many", "stop": "x" * 1000, "logprobs": True, "tools": "none", "messages": 7},
        {"n": None, "stop": None, "response_format": None, "structured_outputs": None},
        {"structured_outputs": {"regex": 7}, "response_format": {"json_schema": "x"}},
        {"messages": [{"role": "user", "content": "see http://a.example/x"}]},
        {"prompt": "http://a.example"},
    ],
)
def test_what_is_fine_or_for_vllm_to_refuse(body: dict[str, Any]) -> None:
    assert violation(body, RowLimits()) is None


def test_limits_can_be_changed() -> None:
    assert broken({"n": 65}, max_n=65) is None
    assert broken({"n": 2}, max_n=1) == "limit_exceeded"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://a.example/x.png"}},
        {"type": "image_url", "image_url": "https://a.example/x.png"},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "audio_url", "audio_url": {"url": "ftp://a.example/x"}},
        {"type": "input_image", "image_url": "//a.example/x"},
        {"type": "file", "file": {"file_url": "/etc/passwd"}},
        {"type": "of the future", "deep": [{"any_url": "gopher://a.example"}]},
    ],
)
def test_content_is_fetched_from_nowhere(part: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]}
    assert broken(body) == "url_not_allowed"
    found = violation(body, RowLimits())
    assert found is not None
    assert "--allow-url-host" in found.message


PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]


@pytest.mark.parametrize("body", [{"input": PICTURE}, {"input": [PICTURE]}, {"messages": PICTURE}])
def test_embeddings_take_chats_as_input(body: dict[str, Any]) -> None:
    assert broken(body) == "url_not_allowed"
    assert broken(body, allowed_url_hosts=frozenset({"A"})) is None, "hosts have no case"


def test_messages_about_numbers() -> None:
    found = violation({"prompt_logprobs": -1}, RowLimits())
    assert found is not None
    assert "is -1, the whole vocabulary, more than 20" in found.message
    assert violation({"prompt_logprobs": -7}, RowLimits()) is None, "vLLM refuses it"
    huge = violation({"n": 10**4000}, RowLimits())
    assert huge is not None
    assert len(huge.message) < 200


def test_any_depth_is_taken() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for name in ("response_format", "tools"):
        assert broken({name: deep}) == "limit_exceeded"
    assert broken({"messages": deep, "input": deep}) is None


@pytest.mark.parametrize("name", ["json", "structural_tag"])
@pytest.mark.parametrize("depth", [200, 900, 10_000])
def test_a_schema_in_a_text_has_a_depth_too(name: str, depth: int) -> None:
    """A regular expression is not out of sight where Python's parser would give up."""
    schema = '{"not":' * depth + "1" + "}" * depth
    assert broken({"structured_outputs": {name: schema}}) == "limit_exceeded"


def test_data_in_the_row_itself_is_fine() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert broken({"messages": [{"role": "user", "content": [part]}]}) is None


ALLOWED = frozenset({"good.example"})


@pytest.mark.parametrize(
    "url",
    ["https://good.example/x.png", "http://good.example:8080/?q=1", "HTTPS://GOOD.example/"],
)
def test_an_allowed_host(url: str) -> None:
    assert refused_host(url, ALLOWED) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/good.example",
        "https://good.example@evil.example/",
        "https://evil.example@good.example/",
        "https://good.example.evil.example/",
        "https://good.example./",
        "https://evil.example\\@good.example/",
        "https://good.example\\.evil.example/",
        " https://good.example/",
        "https://good.example/\n",
        "https://good.example\t.evil.example/",
        "file://good.example/etc/passwd",
        "//good.example/x",
        "good.example/x",
        "https:good.example",
        "https://good.example:80:evil/",
        "https://[::1",
        "https://127.0.0.1/",
        "DATA:text/plain,x",
        " data:text/plain,x",
        "",
    ],
)
def test_what_is_not_clearly_allowed_is_refused(url: str) -> None:
    assert refused_host(url, ALLOWED) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
fields = (
    *("n", "best_of", "stop", "logprobs", "top_logprobs", "response_format", "tools", "messages"),
    "structured_outputs",
)


@given(st.dictionaries(st.sampled_from(fields), json_values))
def test_any_json_is_taken(body: dict[str, Any]) -> None:
    found = violation(body, RowLimits(max_n=1, max_stop=1, max_schema_bytes=9, max_regex_bytes=1))
    assert found is None or len(found.message) < 300


@given(st.text())
def test_any_text_is_taken_as_url(url: str) -> None:
    assert (refused_host(url, ALLOWED) is None) == (
        url.startswith(("data:", "http://good.example", "https://good.example"))
    )
