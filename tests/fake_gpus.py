"""GPUs as ``nvidia-smi`` tells of them, and an engine for GPUs, where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Show = Callable[[int], None]


@pytest.fixture
def show_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Have the driver's tool show a number of GPUs of 80,000 MiB, of which 70,000 are free."""
    folder = tmp_path / "driver"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def show(number: int) -> None:
        lines = [f"{i}, GPU-{i}abc, NVIDIA H100, 80000, 70000" for i in range(number)]
        tool = folder / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        tool.chmod(0o700)

    return show


@pytest.fixture
def engine_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed vLLM that is built for GPUs, by its version."""
    for module in ("app.gpu_machine", "app.plan", "jobs.group"):
        monkeypatch.setattr(f"elbowroom.{module}.engine_version", lambda: "vllm 0.32.0")
