"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from elbowroom.app.machine import cache_path, split_cores
from elbowroom.core.model import DTYPE_BYTES
from tests.demo_job import undisturbed  # noqa: F401 (a fixture of several files)
from tests.planning.facts import CPU

# Machines that run tests are shared: how long an example takes says nothing about our code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(autouse=True, scope="session")
def measured_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of our own that has this machine's measurements: no run stops to make them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    for num_devices, dtype in product(range(1, 9), DTYPE_BYTES):
        path = cache_path(split_cores(num_devices), dtype)
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        link = replace(CPU.links[0], num_devices=num_devices)
        path.write_text(replace(CPU, num_devices=num_devices, links=(link,)).to_toml())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads wait for each other, which takes small models longer than what they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Fails a test that is slower than ``ELBOWROOM_SLOWEST_TEST_SECONDS``, where that is set.

    What takes longer is for every night. Tests with real engines may take four times as long.
    """
    report = yield
    limit = float(os.environ.get("ELBOWROOM_SLOWEST_TEST_SECONDS", "inf"))
    limit *= 4 if item.get_closest_marker("vllm") else 1
    is_nightly = item.get_closest_marker("nightly") is not None
    if report.when == "call" and report.passed and not is_nightly and call.duration > limit:
        report.outcome = "failed"
        report.longrepr = f"took {call.duration:.0f} s, of at most {limit:.0f}: mark it nightly"
    return report
