"""Fixtures of tests of jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from elbowroom.pool import run_dir as run_dir_module
from tests.jobs.stub_runs import ROOT, StubJob


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubJob:
    job = StubJob(tmp_path)
    monkeypatch.setattr(run_dir_module, "default_root", lambda *_: job.run_root)
    monkeypatch.setattr("elbowroom.jobs.restarts._FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.chdir(ROOT)
    return job
