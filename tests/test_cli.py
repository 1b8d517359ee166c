"""The command line: what cannot work is refused before anything is loaded or written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from elbowroom import cli
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

    def run(self, **changes: str) -> int:
        flags = {**self.flags, **{f"--{key.replace('_', '-')}": v for key, v in changes.items()}}
        return cli.main(["run", *(part for flag in flags.items() for part in flag)])


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    async def refuse(*_: object) -> None:
        pytest.fail("the job was started")

    monkeypatch.setattr(cli, "run_job", refuse)
    return Command(tmp_path)


def _check_refused(
    command: Command, capsys: pytest.CaptureFixture[str], words: str, **changes: str
) -> None:
    """Exit code 2, the words on stderr, stdout and disk untouched."""
    assert command.run(**changes) == 2
    out, err = capsys.readouterr()
    assert "elbowroom: " in err
    assert "Traceback" not in err
    assert "".join(words.split()) in "".join(err.split()), err  # rich wraps long lines
    assert out == ""
    assert command.files() == command.before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/no/model"}, "/no/model is not a directory"),
        ({"input": "/no/input.jsonl"}, "cannot read /no/input.jsonl"),
        ({"input": "/tmp"}, "/tmp"),
        ({"memory": "1KiB"}, "--memory gives 1 KiB"),
        ({"memory": "0"}, "--memory gives 0 B"),
        ({"memory": "64MiB", "max_model_len": "100000000"}, "lower --max-model-len"),
        ({"output": "."}, "not a regular file"),
        ({"output": "/"}, "not a regular file"),
        ({"errors": "/dev/null"}, "/dev/null"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_with_the_reason(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
) -> None:
    _check_refused(command, capsys, words, **changes)


def test_output_that_is_the_input(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = "input and --output are the same file"
    _check_refused(command, capsys, words, output=command.flags["--input"])


def test_output_that_is_a_folder(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    _check_refused(command, capsys, "name a file", output=str(command.folder))


def test_a_folder_that_cannot_be_made(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    inside_a_file = str(command.folder / "in.jsonl" / "sub" / "out.jsonl")
    _check_refused(command, capsys, "in.jsonl", output=inside_a_file)


def test_an_empty_batch(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (command.folder / "in.jsonl").write_text("\n\n")
    command.before = command.files()
    _check_refused(command, capsys, "has no rows")


def test_a_model_that_would_run_code(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(command.folder / "model", auto_map={"AutoModel": "evil.Model"})
    command.before = command.files()
    _check_refused(command, capsys, "auto_map")


def test_a_corrupt_model(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (command.folder / "model" / "model.safetensors").write_bytes(b"rubbish")
    command.before = command.files()
    _check_refused(command, capsys, "is corrupt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "lots"}, "write for example 2GiB"),
        ({"memory": "-1GiB"}, "--memory"),
        ({"replicas": "0"}, "'0' is not a whole number from 1"),
        ({"replicas": "1.5"}, "'1.5' is not a whole number from 1"),
        ({"slots": "0"}, "'0' is not a whole number"),
        ({"pool": "cloud"}, "invalid choice: 'cloud'"),
        ({"fetch_order": "random"}, "invalid choice"),
        ({"dtype": "int4"}, "invalid choice"),
        ({"nonsense": "1"}, "unrecognized arguments"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_flags_that_cannot_be_read(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.run(**changes)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert command.files() == command.before


def test_the_account_is_shown_before_a_refusal(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(memory="1MiB", max_num_seqs="100000", replicas="2") == 2
    err = capsys.readouterr().err
    for word in ("> mapped", "streamed", "none", "KV tokens", "does not"):
        assert word in err, word


def test_a_plan_reaches_the_job(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags arrive where they belong; a job without failed rows ends with 0, else with 3."""
    calls = []

    class Report:
        num_failed = 0

    async def run_job(*args: object) -> Report:
        calls.append(args)
        return Report()

    monkeypatch.setattr(cli, "run_job", run_job)
    monkeypatch.setattr(cli, "print_summary", lambda *_: None)
    assert command.run(replicas="3", pool="streamed", slots="1", seed="7", dtype="float32") == 0
    plan, files, facts, _ = calls[0]
    assert plan.num_replicas == 3
    assert {share.mode for share in plan.shares} == {"streamed"}
    assert {share.num_slots for share in plan.shares} == {1}
    assert (plan.engine.seed, plan.engine.dtype, plan.engine.max_num_seqs) == (7, "float32", 4)
    assert "model" in plan.engine.served_model_names
    assert files.output == command.folder / "out.jsonl"
    assert files.errors == command.folder / "out.errors.jsonl"
    assert files.report == command.folder / "out.report.json"
    assert facts.num_rows == 3
    json.dumps(plan.to_json())
    Report.num_failed = 1
    assert command.run() == 3


def test_what_follows_two_dashes_is_for_vllm(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    async def run_job(*args: object) -> object:
        calls.append(args)
        raise cli.InputError("enough")

    monkeypatch.setattr(cli, "run_job", run_job)
    flags = [part for flag in command.flags.items() for part in flag]
    assert cli.main(["run", *flags, "--", "--gpu-flag", "1"]) == 2
    assert calls[0][0].engine.extra == ("--gpu-flag", "1")


def test_cores_are_divided_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6, 8})
    assert cli.split_cores(1) == ((0, 2, 4, 6, 8),)
    assert cli.split_cores(2) == ((0, 2), (4, 6, 8))
    assert cli.split_cores(5) == ((0,), (2,), (4,), (6,), (8,))
    assert cli.split_cores(7) == ((0,), (2,), (4,), (6,), (8,), (0,), (2,))
