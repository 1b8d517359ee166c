"""Fixtures of tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    async def refuse(*_: object) -> None:
        pytest.fail("the job was started")

    monkeypatch.setattr("elbowroom.app.batch.run_job", refuse)
    return Command(tmp_path)
