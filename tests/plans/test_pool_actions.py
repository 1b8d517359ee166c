"""The text form of a fetch and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbowroom.plans.pool_actions import Fetch

COUNTS = st.integers(0, 10**6)


def test_text_form() -> None:
    assert str(Fetch(layer=12, chunk=0, num_chunks=1)) == "F12.0/1"


@given(COUNTS, COUNTS, COUNTS)
def test_parse_undoes_str(layer: int, chunk: int, num_chunks: int) -> None:
    fetch = Fetch(layer, chunk, num_chunks)
    assert Fetch.parse(str(fetch)) == fetch


@pytest.mark.parametrize("text", ["", "F", "F1", "F1.2", "B1.0/1", "F1.0/1 ", "F-1.0/1", "f1.0/1"])
def test_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="not a fetch action"):
        Fetch.parse(text)
