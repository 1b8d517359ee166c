"""Processes that each run a worker of one case after the other: importing torch takes longest."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

_SECONDS = 60.0
"""Within which each worker of a case must end."""


class AnyCase(Protocol):
    @property
    def replicas(self) -> tuple[int, ...]: ...

    def to_json(self) -> str: ...


class Members:
    """As many as the largest case so far needs; after a failure, new ones."""

    def __init__(self, module: str = "tests.pipeline.member") -> None:
        self._module = module
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, case: AnyCase, folder: Path) -> list[dict[str, Any]]:
        """What each worker saw."""
        number = sum(case.replicas)
        while len(self._processes) < number:
            self._processes.append(_start(self._module))
        try:
            for worker, process in enumerate(self._processes[:number]):
                assert process.stdin is not None
                process.stdin.write(json.dumps([case.to_json(), str(folder), worker]) + "\n")
                process.stdin.flush()
            _wait(self._processes[:number])
        except BaseException:
            self.end()
            raise
        return [json.loads((folder / f"{n}.json").read_text()) for n in range(number)]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes.clear()


def run_together(commands: Sequence[Sequence[str]], seconds: float) -> None:
    """Processes that each end well, each within so many seconds of the one before it."""
    processes = [subprocess.Popen(command) for command in commands]
    try:
        for process in processes:
            assert process.wait(seconds) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(module: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", module)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _wait(processes: list[subprocess.Popen[str]]) -> None:
    """Until each has said that it is done; one that dies, or is silent, fails the test."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, process)
        while selector.get_map():
            events = selector.select(_SECONDS)
            assert events, "a worker hangs"
            for key, _ in events:
                assert key.data.stdout.readline() == "done\n"
                selector.unregister(key.fileobj)
