"""The meter counts every byte, refuses at the allocation, and writes down what happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from elbowroom.core.errors import MeterUnavailableError
from elbowroom.swap.meter import build_meter, uncounted_bytes
from tests.swap.steps import needed_meter


def test_what_is_held_and_its_peak_are_counted() -> None:
    meter = needed_meter()
    before = meter.held_bytes
    meter.reset_peak()
    one = torch.empty(1000, dtype=torch.uint8)
    other = torch.empty(500, dtype=torch.uint8)
    assert meter.counts(one.untyped_storage())
    del one
    assert meter.held_bytes == before + other.nbytes
    assert meter.peak_bytes == before + 1500
    assert not meter.counts(torch.UntypedStorage(10))


def test_an_allocation_beyond_the_budget_is_refused_and_the_next_is_not() -> None:
    meter = needed_meter()
    refused, held = meter.num_refused, meter.held_bytes
    with meter.budget(held + 1000):
        torch.empty(1000, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="1001 more"):
            torch.empty(1001, dtype=torch.uint8)
        torch.empty(1000, dtype=torch.uint8)
    torch.empty(100_000, dtype=torch.uint8)
    assert meter.num_refused == refused + 1
    assert meter.held_bytes == held


def test_a_step_that_was_refused_can_be_taken_smaller() -> None:
    meter = needed_meter()
    layer = nn.Linear(64, 64)
    layer(torch.randn(2, 64)).sum().backward()
    with meter.budget(meter.held_bytes + 60_000):
        with pytest.raises(torch.OutOfMemoryError):
            layer(torch.randn(1000, 64))
        layer(torch.randn(8, 64)).sum().backward()


def test_the_log_has_allocations_releases_and_marks() -> None:
    meter = needed_meter()
    meter.start_log()
    one = torch.empty(700, dtype=torch.uint8)
    address = one.data_ptr()
    assert meter.mark() == 1
    del one
    assert meter.num_entries == 3
    log = meter.stop_log()
    torch.empty(100)
    assert log.deltas.tolist() == [700, 0, -700]
    assert log.addresses.tolist() == [address, 0, address]
    assert meter.num_entries == 3


def test_weights_made_before_the_meter_are_known_to_be_uncounted() -> None:
    program = """
import torch
from elbowroom.swap.meter import installed_meter, uncounted_bytes
layer = torch.nn.Linear(100, 100)
meter = installed_meter()
assert meter.held_bytes == 0
print(uncounted_bytes(meter, layer))
"""
    needed_meter()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == 4 * (100 * 100 + 100)
    layer = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    assert uncounted_bytes(needed_meter(), layer, optimizer) == 0


def test_without_a_compiler_there_is_no_meter_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeterUnavailableError, match=r"g\+\+") as caught:
        build_meter()
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
