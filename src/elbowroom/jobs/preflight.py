"""What the rows of a file ask for, and which of them no engine of this run could answer."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from elbowroom.core.errors import InputError, shown
from elbowroom.jobs.request_fields import FIELDS
from elbowroom.jobs.rows import POOLING_URLS, RejectedRow, Row

_MAX_NAMES = 1000
"""Most names that are counted one by one: a file may have any number of them."""

_MAX_SHOWN = 5
_FILE = "--config"
"""Option of vLLM that names a file with others, which are not looked at."""

_NAMES = ("--lora", "--served", _FILE)
"""Options of vLLM by which a model has other names, too."""

_RUNNERS = ("--runner", "--convert", "--task", "--hf-", _FILE)
"""Options of vLLM that may have a generating model give something else."""

_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass
class FileSummary:
    """Rows of a file that are requests, by what they ask for.

    ``models`` counts the names of models, those of ``knowing`` for certain; rows of further
    ones are ``num_other_models``, and rows that name none are served by any. ``ignored`` counts the
    fields of bodies that vLLM does not know and therefore ignores.
    """

    num_requests: int = 0
    urls: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    num_other_models: int = 0

    @staticmethod
    def knowing(models: Collection[str]) -> FileSummary:
        """A summary that counts the rows of these models whatever other names come before."""
        return FileSummary(models=Counter(dict.fromkeys(models, 0)))

    def visit(self, row: Row | RejectedRow) -> None:
        if isinstance(row, RejectedRow):
            return
        self.num_requests += 1
        self.urls[row.url] += 1
        model = row.body.get("model")
        if isinstance(model, str) and model and not _count(self.models, model):
            self.num_other_models += 1
        known = FIELDS[row.url]
        if not known.issuperset(row.body):
            for name in row.body.keys() - known:
                _count(self.ignored, name)


def _count(names: Counter[str], name: str) -> bool:
    """Count a name, unless it is one too many. Returns whether it was counted."""
    is_counted = name in names or len(names) < _MAX_NAMES
    if is_counted:
        names[name] += 1
    return is_counted


class Warned(NamedTuple):
    """What a user should know, and how many rows would fail for it."""

    text: str
    num_rows: int


def warnings(
    summary: FileSummary,
    served: Collection[str],
    architectures: Sequence[str],
    vllm_options: Sequence[str],
) -> Iterator[Warned]:
    """What a user should know before an engine starts, and the flags that help.

    Nothing is said about names when ``served`` is empty: the model is not known. Nor is anything
    said about endpoints without ``architectures``.

    Raises InputError when no row could be answered.
    """
    if summary.ignored:
        yield Warned(f"vLLM ignores these fields: {_named(summary.ignored)}", 0)
    if served and not _is_any_given(_NAMES, vllm_options):
        others = Counter({n: count for n, count in summary.models.items() if n not in served})
        if others:
            names = [shlex.quote(name) for name, _ in others.most_common(_MAX_SHOWN)]
            flags = " ".join(f"--served-model-name {name}" for name in names)
            known = shown(next(iter(served)))
            text = f"another model than {known}: {_named(others)}. Give {flags}"
            yield _unless_all(others.total() + summary.num_other_models, summary, text)
    if (
        architectures
        and all(name.endswith(_GENERATING) for name in architectures)
        and not _is_any_given(_RUNNERS, vllm_options)
    ):
        pooling = Counter({url: summary.urls[url] for url in POOLING_URLS if summary.urls[url]})
        if pooling:
            text = (
                f"what a generating engine does not give: {_named(pooling)}. Start one for them "
                f"with -- --runner pooling --convert embed"
            )
            yield _unless_all(pooling.total(), summary, text)


def _is_any_given(names: tuple[str, ...], vllm_options: Sequence[str]) -> bool:
    return any(option.replace("_", "-").startswith(names) for option in vllm_options)


def _unless_all(num_rows: int, summary: FileSummary, text: str) -> Warned:
    """A warning about some rows. Raises InputError if it is about all that could be answered."""
    text = f"{num_rows} of {summary.num_requests} rows ask for {text}"
    if num_rows == summary.num_requests:
        raise InputError(text)
    return Warned(text, num_rows)


def _named(counts: Counter[str]) -> str:
    """The most frequent names, with the number of rows that have them."""
    some = [f"{shown(name)} ({count} rows)" for name, count in counts.most_common(_MAX_SHOWN)]
    rest = len(counts) - len(some)
    return ", ".join(some) + (f" and {rest} more" if rest else "")
