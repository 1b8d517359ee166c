"""Every architecture of the table gives plain vLLM's answers under every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.equivalence.architectures import TABLE
from tests.equivalence.matrix import ROUNDING, Seen, difference, run
from tests.equivalence.ranks import LONGEST

pytestmark = pytest.mark.vllm

ONE_OF_EACH_KIND = [name for name, architecture in TABLE.items() if architecture.every_push]


def test_one_of_each_kind(tmp_path: Path) -> None:
    """In two processes in all: an engine starts in a few seconds once vLLM is there."""
    for name, seen in run(ONE_OF_EACH_KIND, tmp_path).items():
        _check(name, seen)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in TABLE if name not in ONE_OF_EACH_KIND])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    may_end = TABLE[name].vllm_error is not None
    _check(name, run([name], tmp_path, may_end)[name])


def _check(name: str, seen: Seen) -> None:
    architecture, plain = TABLE[name], seen.plain
    if architecture.vllm_error is not None:
        assert plain.error is not None, f"vLLM runs {name} here: let the table say so"
        assert architecture.vllm_error in plain.error, name
        return
    assert plain.error is None, name
    assert len({json.dumps(row) for row in plain.rows}) == len(plain.rows), "all of them differ"
    none = seen.layouts["none"][0]
    assert none.error is None, name
    if architecture.same_bits:
        assert none.rows == plain.rows, name
    assert difference(none, plain) <= ROUNDING, name
    if seen.budget.kv_is_known:
        planned = seen.budget.kv_tokens_of(LONGEST)
        assert plain.num_kv_tokens == pytest.approx(planned, rel=0.01), name
    for layout, results in seen.layouts.items():
        for rank, found in enumerate(results):
            assert found.error is None, (name, layout, rank)
            assert found.rows == none.rows, (name, layout, rank)
            assert found.num_kv_tokens == none.num_kv_tokens == plain.num_kv_tokens
            assert bool(found.pooled) == (layout != "none"), (name, layout, rank)
