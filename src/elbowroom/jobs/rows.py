"""Rows of a batch file: a request and what follows from it, or the reason why a line is none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from elbowroom.jobs.inputs import BatchInput

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, SCORE, RERANK = "/v1/responses", "/v1/score", "/v1/rerank"
POOLING_URLS = (EMBEDDINGS, SCORE, RERANK)
"""Endpoints of engines that generate nothing."""

BYTES_PER_TOKEN = 4.0
"""Typical bytes per token of English text."""

_DEFAULT_COMPLETION_TOKENS = 16
_PROMPT_KEYS = (
    *("messages", "tools", "prompt", "input", "instructions"),
    *("text_1", "text_2", "queries", "items", "data_1", "data_2", "query", "documents"),
)
_LIMITS = {
    CHAT: ("max_completion_tokens", "max_tokens"),
    COMPLETIONS: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
}
"""Fields that limit an answer, by endpoint; the first that is given counts."""


_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True)
class Row:
    """A request. ``index`` counts non-blank lines from 0, ``line_number`` all lines from 1.

    ``content_hash`` is 64 bits of BLAKE2b over the line without its end. Properties take any JSON.
    """

    index: int
    line_number: int
    custom_id: str
    url: str
    body: dict[str, Any]
    content_hash: int
    source: BatchInput | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Location of the line, for messages."""
        number = self.line_number
        return f"line {number}" if self.source is None else self.source.place(number)

    @cached_property
    def prompt_bytes(self) -> int:
        """Size of what becomes the prompt: messages, tools, text; not the sampling parameters.

        Kept, because a row that waits for room is looked at again whenever another one finishes.
        """
        parts = [self.body[key] for key in _PROMPT_KEYS if key in self.body]
        if len(parts) == 1 and is_list_of(parts[0], int) and parts[0]:
            return int(len(parts[0]) * BYTES_PER_TOKEN)
        return len(json.dumps(parts, ensure_ascii=False))

    @cached_property
    def meaning_hash(self) -> int:
        """64 bits of BLAKE2b over what the request says, however its JSON is written.

        Only the body's own fields may change places, and be 2.0 for 2: inside them, as in a schema
        or a tool, answers depend on the order of keys and on how a number is written.
        """
        fields = [(name, _plain(value)) for name, value in sorted(self.body.items())]
        text = _ENCODER.encode([self.custom_id, self.url, fields])
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    @property
    def max_output_tokens(self) -> int | None:
        """Most tokens that a row asks for in one answer; None is no limit."""
        if self.url not in _LIMITS:
            return 0
        names = _LIMITS[self.url]
        given = next((self.body[name] for name in names if self.body.get(name) is not None), None)
        if given is None and self.url == COMPLETIONS:
            return _DEFAULT_COMPLETION_TOKENS
        return _count(given)

    @property
    def num_answers(self) -> int:
        """Number of answers that one row asks for, over its prompts and choices."""
        choices = _count(self.body.get("n")) or 1
        prompt = self.body.get("prompt") if self.url == COMPLETIONS else None
        num_prompts = len(prompt) if isinstance(prompt, list) and not is_list_of(prompt, int) else 1
        return max(1, num_prompts) * choices

    @property
    def output_limit(self) -> float:
        """Most output tokens of a row over all its answers; infinite where it sets no limit."""
        limit = self.max_output_tokens
        return float("inf") if limit is None else float(limit * self.num_answers)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A line that is sent to no engine, and why."""

    index: int
    line_number: int
    custom_id: str
    code: str
    message: str


def is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    """Whether a value is a list whose first item is a ``kind``; others are not looked at."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], kind)


def _plain(value: Any) -> Any:
    """A number 2.0 as 2, as some writers have it; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(value: Any) -> int | None:
    """A number as vLLM reads it: 2, 2.0 or "2". None for what is no number of tokens or answers."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    value = _plain(value)
    return value if type(value) is int and 0 <= value < 2**31 else None
