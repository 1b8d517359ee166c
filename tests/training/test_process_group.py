"""The group that a grid sends messages by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from elbowroom.training.process_group import group_for_messages


@pytest.fixture
def alone() -> Iterator[None]:
    distributed.init_process_group(
        "gloo",
        store=distributed.HashStore(),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=7),
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_its_threads_wait_for_a_free_core() -> None:
    def policies() -> dict[str, int]:
        return {each.name: os.sched_getscheduler(int(each.name)) for each in tasks.iterdir()}

    tasks = Path("/proc/self/task")
    before, own = policies(), os.sched_getscheduler(0)
    group = group_for_messages()
    distributed.all_reduce(torch.zeros(1), group=group)
    made = {name: policy for name, policy in policies().items() if name not in before}
    assert made and set(made.values()) == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == own
    assert {name: policies()[name] for name in before} == before
