"""The demo's tasks as token ids: what the demo model is trained on, here and in the example."""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedTokenizerFast

import demo_tasks
from demo_tasks import Task

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
KIND_WEIGHTS = {"arithmetic": 9, "units": 3, "dates": 3, "roman": 3, "sorting": 3, "json": 4}
IGNORED = -100

Row = tuple[list[int], int]
"""A task's tokens, and the length of its prompt, where the answer starts."""


def chat_prompt(prompt: str) -> str:
    """Write a question as the chat template does, without rendering the template each time."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n"


def encode(tokenizer: PreTrainedTokenizerFast, tasks: list[Task]) -> list[Row]:
    """Give each task's tokens and the length of its prompt, where the answer starts."""
    prompts = tokenizer([chat_prompt(task.prompt) for task in tasks])["input_ids"]
    answers = tokenizer([task.answer + TURN_END for task in tasks])["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def draw_rows(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int) -> list[Row]:
    """Draw fresh tasks of every kind, none of which the demo may ask."""
    kinds = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=size)
    return encode(tokenizer, [demo_tasks.make_task(rng, kind, held_out=False) for kind in kinds])


def to_batch(
    rows: list[Row], pad: int, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows on the right and mark the targets; only answer tokens count in the loss.

    Both are [rows, width] of int64, by default as wide as the longest row needs.
    """
    width = width or max(len(tokens) for tokens, _ in rows) - 1
    inputs = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (tokens, start) in enumerate(rows):
        inputs[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        targets[i, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return inputs, targets
