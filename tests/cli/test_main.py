"""The command line: what cannot work is refused before anything is loaded or written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.metadata import version

import pytest

from elbowroom.app.machine import split_cores
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError, JobStoppedError, ReplicaError
from elbowroom.jobs.job import Job, JobOptions
from tests.cli.command import Command, check_refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/no/model"}, "/no/model is not a directory"),
        ({"memory": "1KiB"}, "--memory gives 1 KiB"),
        ({"memory": "1B"}, "--memory gives 1 B"),
        ({"memory": "64MiB", "max_model_len": "100000000"}, "lower --max-model-len"),
        ({"output": "."}, "not a regular file"),
        ({"output": "/"}, "not a regular file"),
        ({"errors": "/dev/null"}, "/dev/null"),
        ({"replicas": "2000000000"}, "2000000000 devices are more than"),
        ({"replicas": "9999", "tensor_parallel": "9999"}, "devices are more than"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refused_with_the_reason(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
) -> None:
    check_refused(command, capsys, words, **changes)


def test_output_that_is_the_input(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = "input and --output are the same file"
    check_refused(command, capsys, words, output=command.flags["--input"])


def test_output_that_is_a_folder(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(command, capsys, "name a file", output=str(command.folder))


def test_a_folder_that_cannot_be_made(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    inside_a_file = str(command.folder / "in.jsonl" / "sub" / "out.jsonl")
    check_refused(command, capsys, "in.jsonl", output=inside_a_file)


def test_a_corrupt_model(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (command.folder / "model" / "model.safetensors").write_bytes(b"rubbish")
    command.before = command.files()
    check_refused(command, capsys, "is corrupt")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "lots"}, "write for example 2GiB"),
        ({"memory": "-1GiB"}, "--memory"),
        ({"memory": "512"}, "512 bytes? write 512MiB, or 512B"),
        ({"max_model_len": "9" * 25}, "from 1 to"),
        ({"max_line_bytes": str(2**63 - 1)}, "from 1 to"),
        ({"replicas": "9999999999"}, "from 1 to"),
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


def test_what_was_compared_is_shown_before_a_refusal(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(memory="1MiB", max_num_batched_tokens="100000", replicas="2") == 2
    err = capsys.readouterr().err
    for word in ("d2 mapped", "d2 streamed", "g2 none", "KV tokens", "lacks"):
        assert word in err, word


class Report:
    num_failed = 0


Calls = list[Job]


@pytest.fixture
def calls(command: Command, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Jobs that would have run."""
    calls: Calls = []

    async def run_job(job: Job) -> Report:
        calls.append(job)
        return Report()

    monkeypatch.setattr("elbowroom.app.batch.run_job", run_job)
    monkeypatch.setattr("elbowroom.cli.run.print_summary", lambda *_: None)
    return calls


def test_a_plan_reaches_the_job(command: Command, calls: Calls) -> None:
    """Flags arrive where they belong."""
    assert command.run(replicas="3", pool="streamed", slots="1", seed="7", dtype="float32") == 0
    plan, files, identity = calls[0].plan, calls[0].files, calls[0].identity
    options = calls[0].options
    assert plan.num_replicas == 3
    assert {share.mode for share in plan.shares} == {"streamed"}
    assert {share.num_slots for share in plan.shares} == {1}
    assert (plan.engine.seed, plan.engine.dtype, plan.engine.max_num_seqs) == (7, "float32", 4)
    assert "model" in plan.engine.served_model_names
    assert files.output == command.folder / "out.jsonl"
    assert files.errors == command.folder / "out.errors.jsonl"
    assert files.report == command.folder / "out.report.json"
    assert options == replace(JobOptions(), bytes_per_token=options.bytes_per_token)
    assert (identity["dtype"], identity["seed"]) == ("float32", "7")
    json.dumps(plan.to_json())


def test_options_of_the_job_reach_it(command: Command, calls: Calls) -> None:
    flags = {"order": "input", "grace": "1.5", "max_restarts": "0", "max_n": "3"}
    assert command.run(**flags, max_row_seconds="9", allow_url_host="a.example") == 0
    plan, options = calls[0].plan, calls[0].options
    assert (options.order, options.grace_seconds, options.max_restarts) == ("input", 1.5, 0)
    assert (options.limits.max_n, options.limits.max_row_seconds) == (3, 9.0)
    assert options.limits.allowed_url_hosts == {"a.example"}
    assert plan.engine.extra == ("--allowed-media-domains", "a.example")


def test_what_follows_two_dashes_is_for_vllm(command: Command, calls: Calls) -> None:
    flags = [part for flag in command.flags.items() for part in flag]
    assert main(["run", *flags, "--", "--gpu-flag", "1"]) == 0
    assert calls[0].plan.engine.extra == ("--gpu-flag", "1")


def test_what_answers_depend_on_is_told_apart(command: Command, calls: Calls) -> None:
    model = command.folder / "model"
    command.run()
    command.run(replicas="2", memory="65MiB", pool="none", max_num_seqs="2", order="input")
    command.run(seed="1")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    command.run()
    first, elsewhere, seeded, other_defaults = (job.identity for job in calls)
    assert first == elsewhere, "a job may go on with other hardware"
    assert {field for field in first if first[field] != seeded[field]} == {"seed"}
    assert {field for field in first if first[field] != other_defaults[field]} == {"model"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no"), 2),
        (ReplicaError("no"), 1),
        (JobStoppedError("no"), 75),
        (KeyboardInterrupt(), 75),
    ],
)
def test_exit_codes_of_errors(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("elbowroom.app.batch.run_job", fail)
    assert command.run() == code


def test_failed_rows_have_an_exit_code_of_their_own(
    command: Command, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Report, "num_failed", 1)
    assert command.run() == 3


def test_cores_are_divided_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6, 8})
    assert split_cores(1) == ((0, 2, 4, 6, 8),)
    assert split_cores(2) == ((0, 2), (4, 6, 8))
    assert split_cores(5) == ((0,), (2,), (4,), (6,), (8,))
    assert split_cores(7) == ((0,), (2,), (4,), (6,), (8,), (0,), (2,))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code in (None, 0)
    assert capsys.readouterr() == (f"elbowroom {version('elbowroom')}\n", "")
