"""Fixtures of tests of whole commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from elbowroom.jobs.job import Job
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from tests.app.stub_command import ROOT, Jobs


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    jobs = Jobs(tmp_path)

    async def run_with_stub(job: Job) -> JobReport:
        jobs.num_started += 1
        command = [sys.executable, "-m", "tests.jobs.stub_replica", *jobs.stub]
        return await run_job(job, command)

    monkeypatch.setattr("elbowroom.app.batch.run_job", run_with_stub)
    monkeypatch.chdir(ROOT)
    return jobs
