"""Fixtures of the swap's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from elbowroom.swap.link import Link
from elbowroom.swap.tier import MemoryTier


@pytest.fixture
def link(one_thread: None) -> Iterator[Link]:
    """A link to a tier in memory; one thread computes, so that sums are always the same."""
    link = Link(MemoryTier(1 << 28))
    yield link
    link.close()
