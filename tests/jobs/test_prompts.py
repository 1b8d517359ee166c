"""Prompts as vLLM's server renders them. Counts are those of vLLM 0.32's own renderer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from elbowroom.jobs.prompts import RefusedError, kept_tokens, prompts_of
from elbowroom.jobs.rows import Row

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}go{% endif %}"
    "{% if enable_thinking %} think{% endif %}{% if documents %}{{ documents }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def row(url: str, **body: Any) -> Row:
    return Row(0, 1, "a", url, body, 0)


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOL_TEXT = (
    '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {}}}]'
)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [said("1")]}, "user:1;go"),
        ({"messages": [said("1")], "add_generation_prompt": False}, "user:1;"),
        ({"messages": [said([{"type": "text", "text": t} for t in ("1", "2")])]}, "user:1\n2;go"),
        ({"messages": [said([{"type": "text", "text": None}, "2"])]}, "user:2;go"),
        ({"messages": [said([{"type": "refusal", "refusal": "no"}])]}, "user:no;go"),
        ({"messages": [said("1"), CALL]}, 'user:1;assistant:{"a": [1]};go'),
        ({"messages": [said("1"), {**CALL, "tool_calls": []}]}, "user:1;assistant:;go"),
        (
            {"messages": [said("a", "system"), said("b", "developer"), said("1")]},
            "system:a\n\nb;user:1;go",
        ),
        ({"messages": [said("1")], "tools": [TOOL]}, f"{TOOL_TEXT}user:1;go"),
        ({"messages": [said("1")], "reasoning_effort": "high"}, "user:1;go think"),
        ({"messages": [said("1")], "reasoning_effort": "none"}, "user:1;go"),
        ({"messages": [said("1")], "documents": [{"t": "x"}]}, "user:1;go[{'t': 'x'}]"),
        (
            {"messages": [said("1")], "chat_template_kwargs": {"enable_thinking": True}},
            "user:1;go think",
        ),
        (
            {"messages": [said("1")], "chat_template_kwargs": {"add_generation_prompt": False}},
            "user:1;go",
        ),
    ],
)
def test_chats_are_rendered_as_by_the_server(
    tokenizer: Any, body: dict[str, Any], text: str
) -> None:
    assert prompts_of(row(CHAT, **body), tokenizer) == ([text], False)


def test_the_last_message_can_be_continued(tokenizer: Any) -> None:
    body = {"messages": [said("1"), said("2", "assistant")], "add_generation_prompt": False}
    assert prompts_of(row(CHAT, continue_final_message=True, **body), tokenizer).items == [
        "user:1;assistant:2"
    ]


def test_embeddings_of_chats_have_no_generation_prompt(tokenizer: Any) -> None:
    chat = [said("1")]
    for body in ({"messages": chat}, {"input": chat}, {"input": [chat]}):
        assert prompts_of(row(EMBEDDINGS, **body), tokenizer) == (["user:1;"], False)
    assert prompts_of(row(EMBEDDINGS, input=[chat, chat]), tokenizer).items == ["user:1;"] * 2


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_texts_and_token_ids(tokenizer: Any, name: str) -> None:
    url = COMPLETIONS if name == "prompt" else EMBEDDINGS
    for given, items in (("1", ["1"]), (["1", "2"], ["1", "2"]), ([1, 2], [[1, 2]]), (7, [])):
        assert prompts_of(row(url, **{name: given}), tokenizer) == (items, True)
    assert prompts_of(row(url, **{name: [[1], [2]]}), tokenizer).items == [[1], [2]]
    assert not prompts_of(row(url, add_special_tokens=False), tokenizer).add_special_tokens
    chat = row(CHAT, messages=[said("1")], add_special_tokens=True)
    assert prompts_of(chat, tokenizer).add_special_tokens


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "body",
    [
        {"chat_template": ENDLESS},
        {"chat_template_kwargs": {"chat_template": ENDLESS}},
        {"chat_template_kwargs": {"tokenize": True}},
        {"tools": []},
        {"messages": 7},
    ],
)
def test_what_the_server_refuses_is_not_rendered(tokenizer: Any, body: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        prompts_of(row(CHAT, **{"messages": [said("1")], **body}), tokenizer)


def test_output_tokens() -> None:
    assert row(EMBEDDINGS, max_tokens=5).max_output_tokens == 0
    assert row(COMPLETIONS).max_output_tokens == 16
    assert row(COMPLETIONS, max_tokens=None).max_output_tokens == 16
    assert row(CHAT).max_output_tokens is None
    assert row(CHAT, max_tokens=5).max_output_tokens == 5
    assert row(CHAT, max_tokens=5, max_completion_tokens=9).max_output_tokens == 9
    assert row(CHAT, max_tokens=True).max_output_tokens is None


def test_answers_per_row() -> None:
    assert row(CHAT, n=3).num_answers == 3
    assert row(COMPLETIONS, prompt=["1", "2"], n=3).num_answers == 6
    assert row(COMPLETIONS, prompt=[1, 2], n="3").num_answers == 3
    assert row(CHAT, n=2.0, max_tokens="7").output_limit == 14
    assert row(CHAT, n="many").num_answers == 1


def test_tokens_that_are_kept() -> None:
    assert kept_tokens(row(COMPLETIONS), 20) == 20
    assert kept_tokens(row(COMPLETIONS, truncate_prompt_tokens=4), 20) == 4
    assert kept_tokens(row(COMPLETIONS, truncate_prompt_tokens=40), 20) == 20
    assert kept_tokens(row(COMPLETIONS, truncate_prompt_tokens=True), 20) == 20
