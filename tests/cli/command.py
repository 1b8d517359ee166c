"""A command line that would run, for tests of what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from elbowroom.cli.main import main
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model


class Command:
    """A command line that would run, in a folder of its own, to be spoiled by each test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "model")
        write_batch(folder / "in.jsonl", 3)
        self.flags = {
            "--model": str(folder / "model"),
            "--input": str(folder / "in.jsonl"),
            "--output": str(folder / "out.jsonl"),
            "--memory": "64MiB",
            "--max-num-batched-tokens": "64",
            "--max-num-seqs": "4",
        }
        self.before = self.files()

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in paths}

    def run(self, *vllm_options: str, **changes: str) -> int:
        flags = {**self.flags, **{f"--{key.replace('_', '-')}": v for key, v in changes.items()}}
        behind = ("--", *vllm_options) if vllm_options else ()
        return main(["run", *(part for flag in flags.items() for part in flag), *behind])


def check_refused(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    words: str,
    *vllm_options: str,
    **changes: str,
) -> None:
    """Exit code 2, the words on stderr, stdout and disk untouched."""
    assert command.run(*vllm_options, **changes) == 2
    out, err = capsys.readouterr()
    assert "elbowroom: " in err
    assert "Traceback" not in err
    assert "".join(words.split()) in "".join(err.split()), err  # rich wraps long lines
    assert out == ""
    assert command.files() == command.before
