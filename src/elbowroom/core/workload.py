"""Facts about a job: prompt and output lengths of its rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from elbowroom.core.errors import InputError

_FORMS = "write PROMPT:OUTPUTxROWS, such as 1024:512x10000 or 256-512:384-512x48, with commas"
_NUMBER = r"(\d{1,100})"
_TERM = re.compile(f"{_NUMBER}(?:-{_NUMBER})?:{_NUMBER}(?:-{_NUMBER})?(?:x{_NUMBER})?", re.ASCII)
_MAX_ROWS = 50_000_000
_MAX_TOKENS = 10**9


@dataclass(frozen=True, eq=False)
class Workload:
    """Rows in processing order. Both arrays are int64 [num_rows].

    ``is_bounded`` means that no row generates more output than is counted here. Without
    ``generates``, as for embeddings, rows are counted with one output token all the same: an engine
    spends an iteration on each.
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    is_bounded: bool = True
    generates: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.prompt_tokens)

    @property
    def num_output_tokens(self) -> int:
        return int(self.output_tokens.sum())

    @property
    def num_prompt_tokens(self) -> int:
        return int(self.prompt_tokens.sum())

    @property
    def num_rated_tokens(self) -> int:
        """Tokens by which speed is told: of outputs, or of prompts if nothing is generated."""
        return self.num_output_tokens if self.generates else self.num_prompt_tokens

    @property
    def longest_row(self) -> int:
        return int((self.prompt_tokens + self.output_tokens).max())

    @property
    def shortest_row(self) -> int:
        return int((self.prompt_tokens + self.output_tokens).min())

    @property
    def mean_row(self) -> float:
        return (self.num_prompt_tokens + self.num_output_tokens) / self.num_rows

    @property
    def mean_context(self) -> float:
        """Mean tokens read to decode a token: a row's prompt and, on average, half its output."""
        return (self.num_prompt_tokens + self.num_output_tokens / 2) / self.num_rows

    def every(self, step: int) -> Workload:
        """Every ``step``-th row: the share of one of ``step`` equal groups."""
        return self._with(self.prompt_tokens[::step], self.output_tokens[::step])

    def within(self, most_tokens: int) -> Workload | None:
        """The rows that an engine with ``most_tokens`` as its maximum length accepts, or None.

        The engine refuses prompts that leave no room and outputs that could never fit; other
        outputs are cut where the row is full.
        """
        fits = (self.prompt_tokens < most_tokens) & (self.output_tokens <= most_tokens)
        if not fits.any():
            return None
        prompts = self.prompt_tokens[fits]
        return self._with(prompts, np.minimum(self.output_tokens[fits], most_tokens - prompts))

    def up_to(self, most_tokens: int) -> Workload | None:
        """The rows of at most ``most_tokens`` tokens, prompt and output together, or None."""
        fits = self.prompt_tokens + self.output_tokens <= most_tokens
        return (
            self._with(self.prompt_tokens[fits], self.output_tokens[fits]) if fits.any() else None
        )

    def scaled(self, prompt_factor: float, output_factor: float) -> Workload:
        """The same number of rows with scaled lengths, at least one token for each."""
        prompts = np.maximum(1, np.rint(self.prompt_tokens * prompt_factor)).astype(np.int64)
        outputs = np.maximum(1, np.rint(self.output_tokens * output_factor)).astype(np.int64)
        return self._with(prompts, outputs)

    def longest_first(self) -> Workload:
        """Rows by falling output length: the order of a run, so that its end is short."""
        order = np.argsort(-self.output_tokens, kind="stable")
        return self._with(self.prompt_tokens[order], self.output_tokens[order])

    def _with(self, prompts: NDArray[np.int64], outputs: NDArray[np.int64]) -> Workload:
        return replace(self, prompt_tokens=prompts, output_tokens=outputs)

    def __str__(self) -> str:
        outputs = f"and {self.num_output_tokens} output tokens" if self.generates else "tokens"
        return f"{self.num_rows} rows, {self.num_prompt_tokens} prompt {outputs}"


def workload(prompt_tokens: Sequence[int], output_tokens: Sequence[int]) -> Workload:
    """Build a workload from lengths; zero lengths count as one token.

    Raises InputError when there are no rows, or when the lists differ in length.
    """
    prompts = np.asarray(prompt_tokens, dtype=np.int64)
    outputs = np.asarray(output_tokens, dtype=np.int64)
    if not len(prompts) or prompts.shape != outputs.shape:
        raise InputError(
            f"a workload needs rows with a prompt and an output each, not {len(prompts)} and "
            f"{len(outputs)}"
        )
    return Workload(np.maximum(prompts, 1), np.maximum(outputs, 1))


def parse_lengths(text: str, seed: int = 0) -> Workload:
    """Parse rows from text such as ``1024:512x10000`` or ``256-512:384-512x48,8000:100``.

    A range is a uniform distribution from which lengths are drawn with ``seed``; several terms are
    shuffled together. Raises InputError for anything else.
    """
    generator = np.random.default_rng(seed)
    prompts, outputs = [], []
    num_rows = 0
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise InputError(f"'{term}' gives no lengths: {_FORMS}")
        rows = int(match[5] or 1)
        num_rows += rows
        if not 0 < rows <= num_rows <= _MAX_ROWS:
            raise InputError(f"'{term}' asks for {rows} rows: give 1 to {_MAX_ROWS} in all")
        prompts.append(_draw(generator, match[1], match[2], rows, term))
        outputs.append(_draw(generator, match[3], match[4], rows, term))
    order = generator.permutation(sum(map(len, prompts)))
    return Workload(np.concatenate(prompts)[order], np.concatenate(outputs)[order])


def _draw(
    generator: np.random.Generator, low: str, high: str | None, rows: int, term: str
) -> NDArray[np.int64]:
    least, most = int(low), int(high or low)
    if not 1 <= least <= most:
        raise InputError(f"'{term}': {least} to {most} tokens is no range of lengths: {_FORMS}")
    if most > _MAX_TOKENS:
        raise InputError(f"'{term}': a row of {most} tokens: give 1 to {_MAX_TOKENS}")
    return generator.integers(least, most + 1, rows, dtype=np.int64)
