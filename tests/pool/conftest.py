"""What all tests of pools run with.

One compute thread: tiny matrices on several, on a busy machine, take seconds instead of ms. And
slots that are overwritten when a lease on them ends, so that whoever still reads them computes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pool.spoiled import spoil_released_slots


@pytest.fixture(autouse=True, scope="package")
def one_compute_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def spoiled_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_released_slots(monkeypatch.setattr)
