"""Row lengths of a batch file, for a plan: prompts are counted, outputs assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from elbowroom.core.errors import InputError
from elbowroom.core.files import read_json
from elbowroom.core.workload import Workload, workload
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.rows import BYTES_PER_TOKEN, Row

ASSUMED_OUTPUT_TOKENS = 256
"""Assumed output of a row that sets no limit: its length is unknown until it is answered."""

_COUNTED_CHARS = 100_000
"""Characters counted of one text; the rest of a longer one is assumed to be like its beginning."""

_MOST_ANSWERS = 128
"""Most answers to one row that are counted; limits refuse rows that ask for more."""

_TOKENS_PER_MESSAGE, _TOKENS_PER_CHAT = 5, 3
"""Tokens that ChatML puts around a message (its role, its ends) and before the answer."""


@dataclass(frozen=True)
class FileLengths:
    """Lengths of a file's rows in its order, from ``num_counted`` of them in a large file.

    ``bytes_per_token`` is the prompts' mean, as ``Row.prompt_bytes`` measures them.
    """

    workload: Workload
    num_counted: int
    num_unlimited: int
    bytes_per_token: float

    def __str__(self) -> str:
        text = str(self.workload)
        if self.num_counted < self.workload.num_rows:
            text += f" (from {self.num_counted} rows that were counted)"
        if self.num_unlimited:
            text += f"; rows without max_tokens are taken to give {ASSUMED_OUTPUT_TOKENS} tokens"
        return text


def read_lengths(batch: BatchFile, model_dir: Path, max_rows: int | None = None) -> FileLengths:
    """Count prompts of a scanned file in the model's tokens. Chat templates are estimated.

    At most ``max_rows`` rows are counted, evenly spread, and stand for the others. Outputs are
    assumed to reach their limits. Raises InputError when the file or the tokenizer cannot be read,
    or no row could be answered.
    """
    count, default_limit = _counter(model_dir), _default_limit(model_dir)
    prompts: list[int] = []
    outputs: list[int] = []
    num_counted = num_unlimited = num_bytes = num_tokens = 0
    num_rows = batch.num_rows
    step = max(1, -(-num_rows // max_rows)) if max_rows else 1
    for row in batch.rows(range(0, num_rows, step)):
        if not isinstance(row, Row):
            continue
        num_counted += 1
        limit = default_limit if row.max_output_tokens is None else row.max_output_tokens
        num_unlimited += limit is None
        answers = min(row.num_answers, _MOST_ANSWERS)
        of_prompts = _prompt_tokens(row.body, count)
        num_tokens += sum(of_prompts)
        num_bytes += row.prompt_bytes
        prompts += [sum(of_prompts) // max(1, len(of_prompts))] * answers
        outputs += [ASSUMED_OUTPUT_TOKENS if limit is None else limit] * answers
    if not prompts:
        raise InputError(f"{batch.name} has no row that could be answered: see `elbowroom check`")
    wanted = len(prompts) if step == 1 else round(len(prompts) * num_rows / num_counted)
    order = np.arange(wanted) % len(prompts)
    counted = workload(np.array(prompts)[order], np.array(outputs)[order])
    return FileLengths(
        workload=replace(counted, is_bounded=not num_unlimited, generates=any(outputs)),
        num_counted=num_counted if step > 1 else num_rows,
        num_unlimited=num_unlimited,
        bytes_per_token=num_bytes / max(1, num_tokens),
    )


def _default_limit(model_dir: Path) -> int | None:
    """The output limit of rows that set none, where the model's own settings have one."""
    path = model_dir / "generation_config.json"
    limit = read_json(path).get("max_new_tokens") if path.exists() else None
    return limit if type(limit) is int and limit > 0 else None


def _counter(model_dir: Path) -> Callable[[str], int]:
    path = model_dir / "tokenizer.json"
    if not path.exists():
        return lambda text: int(len(text.encode()) / BYTES_PER_TOKEN)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"cannot load {path}: {error}") from error

    def count(text: str) -> int:
        beginning = text[:_COUNTED_CHARS]
        num_tokens = len(tokenizer.encode(beginning, add_special_tokens=False).ids)
        return num_tokens * len(text) // max(1, len(beginning))

    return count


def _prompt_tokens(body: dict[str, Any], count: Callable[[str], int]) -> list[int]:
    """Tokens of each prompt of a row."""
    messages = body.get("messages")
    if isinstance(messages, list):
        counts = (_TOKENS_PER_MESSAGE + count(text) for text in _texts(messages))
        return [sum(counts, _TOKENS_PER_CHAT)]
    given = body.get("prompt", body.get("input"))
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [len(given)]
    return [count(text) for text in _texts(given)]


def _texts(value: Any) -> Iterator[str]:
    """Texts of messages, at any depth of lists and contents."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key in ("content", "text"):
            yield from _texts(value.get(key))
