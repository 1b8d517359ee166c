"""Check of a batch file before a device is touched: bad rows, tokens, lengths."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from elbowroom.core.errors import InputError, first_line
from elbowroom.core.model_config import read_config
from elbowroom.jobs.batch_file import BatchFile
from elbowroom.jobs.inputs import BatchInput
from elbowroom.jobs.limits import RowLimits, regexes, schemas
from elbowroom.jobs.preflight import FileSummary
from elbowroom.jobs.prompts import RefusedError, kept_tokens, prompts_of
from elbowroom.jobs.rows import EMBEDDINGS, RejectedRow, Row

MAX_PROBLEMS = 1000
"""Most problems that are kept; further ones are only counted."""

_BATCH_ROWS = 256
_MAX_SHOWN = 20
_BAR_CHARS = 40


class Problem(NamedTuple):
    """A row that would fail, and why."""

    line_number: int
    custom_id: str
    code: str
    message: str


@dataclass
class CheckReport:
    """Contents of a batch file: rows, problems, prompt and output tokens.

    ``prompt_lengths`` counts prompts by the power of two that they do not exceed. Tokens are None
    without a model. ``output_token_limit`` sums the most tokens that rows ask for; rows without a
    limit are counted in ``num_unlimited``.
    """

    num_rows: int = 0
    num_problems: int = 0
    problem_counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    summary: FileSummary = field(default_factory=FileSummary)
    warnings: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    output_token_limit: int = 0
    num_unlimited: int = 0
    seconds: float = 0.0

    def add_problem(self, row: Row | RejectedRow, code: str, message: str) -> None:
        self.num_problems += 1
        self.problem_counts[code] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(row.line_number, row.custom_id, code, message))

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "summary"}
        problems = [problem._asdict() for problem in self.problems]
        summary = {**vars(self.summary), "models": +self.summary.models}
        return {**own, **summary, "problems": problems}


def check_file(
    source: BatchInput | Path,
    model_dir: Path | None,
    max_model_len: int | None,
    limits: RowLimits,
    models: Collection[str] = (),
) -> CheckReport:
    """Check a file in one pass.

    Takes 29 bytes of memory per row, and 8 more for each that is none. With a model folder prompts
    are put through its chat template and counted in its tokens, on all cores. ``max_model_len``
    None is what the model was made for; ``models`` are names whose rows are counted for certain.
    Raises InputError when the file or the tokenizer cannot be read.
    """
    begin = time.monotonic()
    report = CheckReport(summary=FileSummary.knowing(models))
    counter = None
    if model_dir is not None:
        counter = PromptCounter(model_dir, max_model_len, limits.max_prompt_tokens)
        report.prompt_tokens = 0
    waiting: list[Row] = []
    rejected = array("Q")

    def visit(row: Row | RejectedRow) -> None:
        report.num_rows += 1
        report.summary.visit(row)
        if isinstance(row, RejectedRow):
            rejected.append(row.index)
            return
        _check_row(row, report)
        if counter is not None:
            waiting.append(row)
            if len(waiting) == _BATCH_ROWS:
                counter.count(waiting, report)
                waiting.clear()

    with BatchFile(source, limits) as batch:
        batch.scan(visit)
        if counter is not None:
            counter.count(waiting, report)
        # Only now is it known which ids are used before, and under which these are in the results.
        for index in np.union1d(rejected, batch.duplicates()).tolist():
            row = batch.read(int(index))
            assert isinstance(row, RejectedRow)
            report.add_problem(row, row.code, row.message)
    report.problems.sort()
    report.seconds = time.monotonic() - begin
    return report


class PromptCounter:
    """Counter of prompts in the tokens of a model, as its server would count them."""

    def __init__(
        self, model_dir: Path, max_model_len: int | None, max_prompt_tokens: int | None
    ) -> None:
        """Load the tokenizer. Raises InputError when that fails."""
        try:
            from transformers import AutoTokenizer  # takes seconds
        except ImportError as error:
            raise InputError(
                "to count tokens needs transformers: pip install 'elbowroom[cpu]', or give "
                "--no-tokens"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the library raises for what it cannot read
            reason = first_line(error)
            raise InputError(
                f"cannot load the tokenizer of {model_dir}: {reason.rstrip(' :.')}. Check --model, "
                f"or give --no-tokens"
            ) from error
        self._max_model_len = max_model_len or read_config(model_dir).max_model_len
        self._max_prompt_tokens = max_prompt_tokens

    def count(self, rows: Sequence[Row], report: CheckReport) -> None:
        """Add the prompts of some rows to the report."""
        lengths: dict[int, list[int]] = {}
        texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for at, row in enumerate(rows):
            try:
                prompts, add_special_tokens = prompts_of(row, self._tokenizer)
            except RefusedError as error:
                report.add_problem(row, "template_error", f"{row.place}: {error}")
                continue
            except Exception as error:  # a template may raise anything
                problem = f"{row.place}: the chat template refused it: {error}"
                report.add_problem(row, "template_error", problem)
                continue
            lengths[at] = [len(prompt) for prompt in prompts if not isinstance(prompt, str)]
            texts[add_special_tokens] += [(at, text) for text in prompts if isinstance(text, str)]
        for add_special_tokens, found in texts.items():
            if found:
                encoded = self._tokenizer(
                    [text for _, text in found], add_special_tokens=add_special_tokens
                )["input_ids"]
                for (at, _), ids in zip(found, encoded, strict=True):
                    lengths[at].append(len(ids))
        for at, of_row in lengths.items():
            self._add(rows[at], of_row, report)

    def _add(self, row: Row, lengths: list[int], report: CheckReport) -> None:
        assert report.prompt_tokens is not None
        lengths = [kept_tokens(row, length) for length in lengths]
        report.prompt_tokens += sum(lengths)
        report.prompt_lengths.update(1 << max(0, length - 1).bit_length() for length in lengths)
        longest = max(lengths, default=0)
        room = self._max_model_len
        if room is not None and row.url != EMBEDDINGS:
            asked = row.max_output_tokens
            if asked is not None and asked > room:
                problem = f"asks for {asked} output tokens, at most {room} fit with the prompt"
                report.add_problem(row, "max_tokens", f"{row.place}: {problem}")
            room -= 1  # an answer has at least one token
        most = min(
            (cap for cap in (room, self._max_prompt_tokens) if cap is not None), default=None
        )
        if most is not None and longest > most:
            report.add_problem(
                row,
                "prompt_too_long",
                f"{row.place}: the prompt has {longest} tokens, at most {most} fit",
            )


def print_report(console: Console, report: CheckReport) -> None:
    table = Table(show_header=False, box=None)
    problems = ", ".join(f"{n} {code}" for code, n in report.problem_counts.most_common())
    table.add_row("rows", f"{report.num_rows} in {report.seconds:.1f} s")
    table.add_row("problems", f"{report.num_problems}" + (f": {problems}" if problems else ""))
    for url, count in report.summary.urls.most_common():
        table.add_row(url, f"{count} rows")
    if report.prompt_tokens is not None:
        table.add_row("prompt tokens", str(report.prompt_tokens))
    unlimited = f" and {report.num_unlimited} rows without a limit" if report.num_unlimited else ""
    table.add_row("output tokens", f"at most {report.output_token_limit}{unlimited}")
    console.print(table)
    if report.prompt_lengths:
        console.print("prompts by length in tokens:")
        highest = max(report.prompt_lengths.values())
        for length, count in sorted(report.prompt_lengths.items()):
            bar = "#" * -(-count * _BAR_CHARS // highest)
            console.print(f"  up to {length:>8} {bar} {count}", highlight=False)
    for warning in report.warnings:
        console.print(warning, markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems[:_MAX_SHOWN]:
        shown = f"{problem.message} [{problem.code}]"
        console.print(shown, markup=False, highlight=False, soft_wrap=True)
    if report.num_problems > _MAX_SHOWN:
        console.print(
            f"... and {report.num_problems - _MAX_SHOWN} more (--json has {MAX_PROBLEMS})"
        )


def _check_row(row: Row, report: CheckReport) -> None:
    limit = row.max_output_tokens
    if limit is None:
        report.num_unlimited += 1
    else:
        report.output_token_limit += limit * row.num_answers
    for name, reason in _faults(row.body):
        report.add_problem(row, "invalid_schema", f"{row.place}: {name}: {reason}")


def _faults(body: dict[str, Any]) -> list[tuple[str, str]]:
    """Schemas and regular expressions that no engine can follow, and why."""
    faults = []
    for name, schema in schemas(body):
        if schema is not None and (reason := _schema_fault(schema)):
            faults.append((name, reason))
    for name, regex in regexes(body):
        if name.startswith("pattern in"):
            continue  # that is part of its schema
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            faults.append((name, f"not a regular expression: {error}"))
    return faults


def _schema_fault(schema: Any) -> str | None:
    import jsonschema

    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"not a JSON schema: {error.message[:200]}"
    except Exception as error:  # not JSON, or nothing that could be a schema
        return f"not a JSON schema: {str(error)[:200]}"
    return None
