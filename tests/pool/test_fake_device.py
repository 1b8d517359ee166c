"""The stand-in for a device: what is seen with it can be trusted where it keeps CUDA's meaning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pool.fake_device import (
    FakeDevice,
    Graph,
    HangError,
    IsolationError,
    Mark,
    UnjoinedError,
    UnsupportedError,
    Work,
)
from tests.pool.fake_operations import Issuing

SLOW = 1e-9  # the pace of a stream that is taken when no other can be


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = FakeDevice(copy_pace=SLOW)
    with torch.inference_mode(), Issuing(device):
        yield device


def test_work_runs_when_the_host_waits(device: FakeDevice) -> None:
    x = torch.zeros(4)
    device.synchronize()
    x.add_(1)
    y = x * 2
    with torch.utils._python_dispatch._disable_current_modes():
        assert x.tolist() == [0] * 4
    assert y.sum().item() == 8, "a read by the host waits"


def test_copies_are_torn(device: FakeDevice) -> None:
    seen = set()
    for _ in range(50):
        source, target = torch.ones(4), torch.zeros(4)
        device.synchronize()
        with device.stream(device.Stream()):
            target.copy_(source)
        other = device.Stream()
        with device.stream(other):
            now = target.clone()
        other.synchronize()
        device.synchronize()
        seen.add(tuple(now.tolist()))
    assert (0, 0, 1, 1) in seen


def test_a_wait_is_for_the_last_record_before_it(device: FakeDevice) -> None:
    copies, event = device.Stream(), device.Event()
    x = torch.zeros(1)
    device.synchronize()
    event.wait()  # never recorded: holds nobody up
    with device.stream(copies):
        x.add_(1)
        event.record()
    event.wait()
    with device.stream(copies):
        x.add_(1)
        event.record()
    assert x.item() == 1


def test_a_graph_runs_after_what_was_there_and_before_what_comes(device: FakeDevice) -> None:
    x, capture, copies = torch.zeros(1), device.Stream(), device.Stream()
    device.synchronize()
    graph = Graph(device)
    with graph.capturing(capture):
        copies.wait_stream(capture)
        with device.stream(copies):
            x.mul_(2)
        capture.wait_stream(copies)
    assert x.item() == 0
    x.add_(1)
    graph.replay()
    graph.replay()
    x.add_(1)
    assert x.item() == 5


def test_a_capture_is_on_its_own(device: FakeDevice) -> None:
    event = device.Event()
    event.record()
    with pytest.raises(IsolationError), Graph(device).capturing(device.Stream()):
        event.wait()
    with Graph(device).capturing(device.Stream()):
        event.record()
    with pytest.raises(IsolationError):
        event.wait()
    with pytest.raises(IsolationError), Graph(device).capturing(device.Stream()):
        event.wait()


def test_a_capture_ends_joined(device: FakeDevice) -> None:
    x, capture, copies = torch.zeros(1), device.Stream(), device.Stream()
    with pytest.raises(UnjoinedError), Graph(device).capturing(capture):
        copies.wait_stream(capture)
        with device.stream(copies):
            x.add_(1)
            event = device.Event()
            event.record()
            x.add_(1)
        event.wait()


def test_the_host_does_not_wait_in_a_capture(device: FakeDevice) -> None:
    capture = device.Stream()
    with Graph(device).capturing(capture):
        with pytest.raises(UnsupportedError):
            device.synchronize()
        with pytest.raises(UnsupportedError):
            capture.synchronize()
        with pytest.raises(UnsupportedError):
            torch.zeros(1).item()


def test_a_wait_for_what_never_comes_is_no_endless_loop(device: FakeDevice) -> None:
    device.default.put(Work(waits_for=Mark()))
    with pytest.raises(HangError):
        device.synchronize()
    device.default.work.clear()
