"""Lengths of a job: what text means, and what is refused."""

from __future__ import annotations

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.workload import parse_lengths, workload


def test_terms_are_mixed_and_ranges_are_drawn_the_same_each_time() -> None:
    rows = parse_lengths("10:5x3,100-200:7-9x50")
    assert rows.num_rows == 53
    pairs = sorted(zip(rows.prompt_tokens.tolist(), rows.output_tokens.tolist(), strict=True))
    assert pairs[:3] == [(10, 5)] * 3
    assert all(100 <= prompt <= 200 and 7 <= output <= 9 for prompt, output in pairs[3:])
    assert len(set(pairs)) > 20
    again = parse_lengths("10:5x3,100-200:7-9x50")
    assert (again.prompt_tokens == rows.prompt_tokens).all()


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("1024:512x1000000000", "50000000 in all"),
        ("1:1x50000000,1:1", "50000000 in all"),
        ("9999999999:1", "1 to 1000000000"),
        ("1:1-99999999999999999999", "1 to 1000000000"),
    ],
)
def test_what_is_too_much_is_told_with_the_limit(text: str, limit: str) -> None:
    with pytest.raises(InputError, match=limit):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["", "5", "5:", "0:5", "9-3:5", "5:5x0", "5:5x99999999999", "a:b"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write PROMPT|give 1 to"):
        parse_lengths(text)


def test_rows_have_a_prompt_and_an_output() -> None:
    with pytest.raises(InputError, match="not 2 and 1"):
        workload([1, 2], [3])
    with pytest.raises(InputError, match="not 0 and 0"):
        workload([], [])
    assert workload([0], [0]).longest_row == 2


def test_scaled_rows_keep_a_token_of_both() -> None:
    rows = workload([10, 1], [100, 8]).scaled(2.0, 0.05)
    assert rows.prompt_tokens.tolist() == [20, 2]
    assert rows.output_tokens.tolist() == [5, 1]


def test_sorting_and_sampling_keep_rows_together() -> None:
    rows = workload([1, 2, 3, 4], [10, 30, 20, 30])
    longest = rows.longest_first()
    assert longest.prompt_tokens.tolist() == [2, 4, 3, 1]
    assert longest.every(2).output_tokens.tolist() == [30, 20]
