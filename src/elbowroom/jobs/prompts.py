"""Prompts of a request as vLLM's server renders them, without vLLM. Compared with vLLM 0.32."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from elbowroom.jobs.rows import CHAT, EMBEDDINGS, Row, is_list_of

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")


class Prompts(NamedTuple):
    """Texts or token ids, and whether the tokenizer adds its special tokens to the texts."""

    items: list[str | list[int]]
    add_special_tokens: bool


class RefusedError(Exception):
    """A request that vLLM would answer with status 400."""


def prompts_of(row: Row, tokenizer: Any) -> Prompts:
    """Render the prompts of a row. Raises RefusedError, or whatever the template raises.

    Templates that a request brings are not rendered: they could run for ever, and vLLM refuses them
    unless it is started with --trust-request-chat-template.
    """
    body = row.body
    conversations = _conversations(row)
    if conversations is None:
        given = body.get("input") if row.url == EMBEDDINGS else body.get("prompt")
        is_one = isinstance(given, str) or is_list_of(given, int)
        prompts = [given] if is_one else given if isinstance(given, list) else []
        items = [prompt for prompt in prompts if isinstance(prompt, str | list)]
        return Prompts(items, bool(body.get("add_special_tokens", True)))
    texts = [_render(row, conversation, tokenizer) for conversation in conversations]
    return Prompts(list(texts), bool(body.get("add_special_tokens", False)))


def kept_tokens(row: Row, num_tokens: int) -> int:
    """Tokens left of a prompt that its request has truncated.

    -1 truncates to what fits, which counts as 0 here.
    """
    most = row.body.get("truncate_prompt_tokens")
    if type(most) is not int:
        return num_tokens
    return 0 if most == -1 else min(num_tokens, max(0, most))


def _conversations(row: Row) -> list[Any] | None:
    """Conversations of a request; None when it is no chat. Raises RefusedError for a bad one."""
    messages = row.body.get("messages")
    if row.url == CHAT:
        if not isinstance(messages, list):
            raise RefusedError("'messages' must be a list")
        return [messages]
    if row.url != EMBEDDINGS:
        return None
    given = messages if messages is not None else row.body.get("input")
    if is_list_of(given, dict):
        return [given]
    return given if is_list_of(given, list) and is_list_of(given[0], dict) else None


def _render(row: Row, conversation: list[Any], tokenizer: Any) -> str:
    body, is_chat = row.body, row.url == CHAT
    own = body.get("chat_template_kwargs") or {}
    if body.get("chat_template") is not None or own.keys() & {"chat_template", "tokenize"}:
        raise RefusedError(
            "a request may not bring a chat template, unless vLLM trusts it; it was not rendered"
        )
    options: dict[str, Any] = {
        "add_generation_prompt": body.get("add_generation_prompt", is_chat),
        "continue_final_message": body.get("continue_final_message", False),
    }
    if is_chat:
        effort = body.get("reasoning_effort")
        options |= {"documents": body.get("documents"), "reasoning_effort": effort}
        if effort is not None and "enable_thinking" not in own:
            options["enable_thinking"] = effort != "none"
    set_options = {name: value for name, value in options.items() if value not in (None, "auto")}
    template = tokenizer.get_chat_template()
    knows_developer = '"developer"' in template or "'developer'" in template
    rendered = tokenizer.apply_chat_template(
        _messages(conversation, knows_developer),
        tools=_tools(body.get("tools")) if is_chat else None,
        tokenize=False,
        **{**own, **set_options},
    )
    assert isinstance(rendered, str)
    return rendered


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools with the fields that vLLM's own classes write into the prompt."""
    if tools is None:
        return None
    if not tools:
        raise RefusedError("'tools' must not be empty")
    return [{"type": "function", "function": _function(tool["function"])} for tool in tools]


def _function(given: dict[str, Any]) -> dict[str, Any]:
    always = {name: given.get(name) for name in ("name", "description", "parameters")}
    return always | ({} if given.get("strict") is None else {"strict": given["strict"]})


def _messages(conversation: list[Any], knows_developer: bool) -> list[dict[str, Any]]:
    messages = [_message(message) for message in conversation]
    if knows_developer or all(message["role"] != "developer" for message in messages):
        return messages
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"
    systems = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if len(systems) == 1 and messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": "\n\n".join(filter(None, systems))}, *others]


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message with the fields that vLLM gives to a template.

    Text parts are joined as for models that only take text.
    """
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(text for part in content if (text := _text(part)) is not None)
    message = {"role": given["role"], "content": "" if content is None else content}
    message |= {name: given[name] for name in ("name", "task") if isinstance(given.get(name), str)}
    if given["role"] == "tool" and "tool_call_id" in given:
        message["tool_call_id"] = given["tool_call_id"]
    if given["role"] == "assistant":
        reasoning = given.get("reasoning") or given.get("reasoning_content")
        if reasoning is not None:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if given.get("tool_calls"):
            message["tool_calls"] = [_tool_call(call) for call in given["tool_calls"]]
    return message


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates expect."""
    arguments = call["function"].get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = None
    function = {**call["function"], "arguments": parsed if isinstance(parsed, dict) else {}}
    return {**call, "function": function}


def _text(part: Any) -> str | None:
    """Text of a message part; None if the part is not text, or has none."""
    if isinstance(part, str):
        return part
    kind = part.get("type")
    if kind not in _TEXT_PARTS:
        return None
    text = part.get(kind if kind in ("refusal", "thinking") else "text")
    return text if isinstance(text, str) else None
