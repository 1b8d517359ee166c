"""Inputs from public bug reports of batch jobs: each with the right value, and nothing lost.

``tests/data/batch`` has them; replicas are stubs that answer with the prompt.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elbowroom
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError, OutputError
from elbowroom.jobs.identity import job_identity
from elbowroom.jobs.job import Job
from elbowroom.jobs.journal_reader import journal_folder
from elbowroom.jobs.report import JobReport
from elbowroom.jobs.runner import run_job
from elbowroom.plans.pool import EngineOptions
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "data" / "batch"


class Jobs:
    """``elbowroom run`` on a small model whose replicas are stubs, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.output = folder / "out.jsonl"
        self.num_started = 0
        self.stub: list[str] = []
        write_model(self.model)

    def flags(self, *names: str | Path) -> list[str]:
        files = [str(CASES / name) for name in names]
        return ["--model", str(self.model), "--input", *files, "--output", str(self.output)]

    def run(self, *names: str | Path, more: tuple[str, ...] = ()) -> int:
        small = ("--memory", "64MiB", "--max-num-batched-tokens", "64", "--max-num-seqs", "4")
        return main(["run", *self.flags(*names), *small, *more])

    def ids(self, name: str = "out.jsonl") -> list[str]:
        return [line["custom_id"] for line in self.lines(name)]

    def lines(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_bytes().split(b"\n")[:-1]]


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


Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> Check:
    def run_check(name: str, *more: str, code: int = 3) -> dict[str, Any]:
        words = [str(CASES / name), "--model", str(jobs.model), "--no-tokens", "--json", *more]
        assert main(["check", *words]) == code
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    return run_check


def codes(report: dict[str, Any]) -> dict[str, str]:
    return {problem["custom_id"]: problem["code"] for problem in report["problems"]}


def test_embeddings_as_bytes_are_refused(check: Check) -> None:
    found = check("f01_embeddings_bytes.jsonl", "--", "--runner", "pooling")
    assert codes(found) == {"lost-1": "invalid_body", "lost-2": "invalid_body"}


def test_every_file_that_a_shell_names_is_read(jobs: Jobs) -> None:
    assert jobs.run("f02_part1.jsonl", "f02_part2.jsonl") == 0
    assert jobs.ids() == ["p1", "p2"]
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--model", "m", "--output", "o", "--input", "a", "--order", "auto", "stray"])
    assert stopped.value.code == 2


def test_another_model_is_known_before_the_start(
    jobs: Jobs, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "f03_wrong_model.jsonl"
    found = check(name)
    assert found["models"] == {"gpt-4o-mini": 3}
    assert "--served-model-name gpt-4o-mini" in found["warnings"][0]
    assert jobs.run(name) == 2
    assert jobs.num_started == 0
    assert "--served-model-name gpt-4o-mini" in capsys.readouterr().err
    assert check(name, "--served-model-name", "gpt-4o-mini", code=0)["warnings"] == []
    assert jobs.run(name, more=("--served-model-name", "gpt-4o-mini")) == 0
    assert jobs.ids() == ["r0", "r1", "r2"]


def test_a_template_that_is_edited_is_another_job(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    template = tmp_path / "t.jinja"
    identities = []
    for name in ("f04_t1.jinja", "f04_t2.jinja", "f04_t1.jinja"):
        template.write_text((CASES / name).read_text())
        for words in (("--chat-template", str(template)), (f"--chat-template={template}",)):
            engine = EngineOptions("float32", 64, 4, 64, ("m",), extra=words)
            identities.append(job_identity(tmp_path / "model", engine))
    first, _, other, _, again, _ = identities
    field = "files that vLLM options name"
    assert first[field] != other[field]
    assert first == again
    assert identities[0][field] == identities[1][field]


def test_fields_of_older_versions_are_refused_by_name(jobs: Jobs, check: Check) -> None:
    name = "f05_guided_choice.jsonl"
    assert codes(check(name)) == {"old": "field_removed"}
    assert jobs.run(name) == 3
    assert jobs.ids() == ["new"]
    (failed,) = jobs.lines("out.errors.jsonl")
    assert "'structured_outputs': {'choice'" in failed["error"]["message"]


def test_fields_that_are_ignored_are_counted(jobs: Jobs, check: Check, tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", 3, temprature=0.5, best_of=2)
    found = check(str(path), code=0)
    assert found["ignored"] == {"temprature": 3, "best_of": 3}
    assert "temprature" in found["warnings"][0]


def test_an_id_that_can_be_read_is_used(jobs: Jobs, check: Check) -> None:
    name = "f06_id_is_readable.jsonl"
    assert set(codes(check(name))) == {"nan", "huge", "half"}
    assert jobs.run(name) == 3
    assert jobs.ids("out.errors.jsonl") == ["nan", "huge", "half"]


def test_results_have_no_line_ends_but_their_own(jobs: Jobs) -> None:
    assert jobs.run("f07_u2028.jsonl") == 0
    (line,) = jobs.output.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["custom_id"] == "a\u2028b\u0085c"
    assert json.loads(line)["response"]["body"]["text"] == "x\u2028y\u2029z\u0085w"


def test_embeddings_without_an_engine_for_them(check: Check) -> None:
    name = "f08_embeddings_without_pooling.jsonl"
    demo = ("--model", str(ROOT / "examples" / "demo" / "model"))
    assert "--runner pooling" in check(name, *demo)["warnings"][0]
    assert check(name, *demo, "--", "--runner", "pooling", code=0)["warnings"] == []


def test_one_huge_limit_takes_nothing_from_the_others(
    jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "f09_one_huge_max_tokens.jsonl"
    assert jobs.run(name) == 0
    assert "no prediction" not in capsys.readouterr().err
    report = json.loads((jobs.folder / "out.report.json").read_text())
    assert report["plan"]["prediction"]["num_rows"] == 4
    assert main(["plan", "--model", str(jobs.model), "--input", str(CASES / name)]) == 0
    assert "1 of more than" in capsys.readouterr().out


def test_a_limit_written_as_a_float(check: Check) -> None:
    found = check("f10_float_max_tokens.jsonl", code=0)
    assert (found["output_token_limit"], found["num_unlimited"]) == (4, 0)


def test_lines_that_are_no_results() -> None:
    given = str(CASES / "f11_verify_in.jsonl")
    assert main(["verify", given, str(CASES / "f11_verify_no_results.jsonl")]) == 2
    assert main(["verify", given, given]) == 2


def test_byte_order_marks_in_the_middle(check: Check) -> None:
    assert check("f12_bom_twice.jsonl", code=0)["num_problems"] == 0


@pytest.mark.parametrize("name", ["f13_memory_fraction_8.toml", "f13_unknown_key.toml"])
def test_clusters_that_cannot_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as refused:
        elbowroom.read_cluster(CASES / name)
    assert ("memory_fraction" if "fraction" in name else "colour") in str(refused.value)


@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl", "out.report.json"])
def test_what_is_not_ours_is_left_alone(
    jobs: Jobs, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = jobs.folder / name
    foreign.write_text("mine\n")
    assert jobs.run("f02_part1.jsonl") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert foreign.read_text() == "mine\n"
    assert jobs.num_started == 0
    assert jobs.run("f02_part1.jsonl", more=("--overwrite",)) == 0
    assert jobs.run("f02_part1.jsonl") == 0, "now it is ours"
    assert jobs.ids() == ["p1"]


def test_errors_that_are_not_ours_beside_a_job_of_ours(jobs: Jobs) -> None:
    assert jobs.run("f02_part1.jsonl") == 0
    (other := jobs.folder / "e.jsonl").write_text("mine\n")
    assert jobs.run("f02_part1.jsonl", more=("--errors", str(other))) == 2
    assert other.read_text() == "mine\n"


@pytest.mark.parametrize("output", ["-", "s3://bucket/out.jsonl"])
def test_outputs_that_are_no_files(
    jobs: Jobs, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jobs.folder)
    before = sorted(jobs.folder.iterdir())
    with pytest.raises(OutputError):
        elbowroom.run_batch(jobs.model, CASES / "f02_part1.jsonl", output)
    assert sorted(jobs.folder.iterdir()) == before


def test_failed_rows_are_tried_again(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 40)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    failed = jobs.ids("out.errors.jsonl")
    assert len(failed) == 4
    jobs.stub = []
    capsys.readouterr()
    assert jobs.run(path) == 3
    assert "4 rows have failed: --retry-failed" in capsys.readouterr().err
    assert jobs.run(path, more=("--retry-failed",)) == 0
    assert "4 rows that failed are tried again" in capsys.readouterr().err
    assert jobs.ids() == [f"id-{index}" for index in range(40)]
    assert not (jobs.folder / "out.errors.jsonl").exists()
    report = json.loads((jobs.folder / "out.report.json").read_text())
    assert report["num_resumed"] == 36


def test_what_failed_by_a_flag_is_tried_again_with_another(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 40)
    jobs.stub = ["--refuses", "10"]
    assert jobs.run(path) == 3
    jobs.stub = []
    assert jobs.run(path, more=("--served-model-name", "other")) == 0
    assert len(jobs.ids()) == 40


def test_another_job_may_follow_one_without_answers(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 4)
    jobs.stub = ["--refuses", "1"]
    assert jobs.run(path) == 3
    jobs.stub = []
    assert jobs.run(path, more=("--seed", "1")) == 0
    assert jobs.run(path, more=("--seed", "2")) == 2, "these have answers"


def rewritten(path: Path, write: Callable[[Any], str]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{write(row)}\n" for row in rows))


@pytest.mark.parametrize(
    "write",
    [
        lambda row: json.dumps(row, separators=(",", ":")),
        lambda row: json.dumps(row, sort_keys=True, indent=None),
        lambda row: json.dumps({**row, "body": {**row["body"], "max_tokens": 8.0}}),
        lambda row: json.dumps(dict(reversed(row.items()))),
    ],
    ids=["compact", "sorted", "floats", "reversed"],
)
def test_an_input_that_is_written_anew_is_the_same(jobs: Jobs, write: Callable[[Any], str]) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 20)
    assert jobs.run(path) == 0
    rewritten(path, write)
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[0].replace("id-0", "new") + "\n")
    jobs.stub = ["--log", str(jobs.folder / "answered")]
    assert jobs.run(path) == 0
    assert (jobs.folder / "answered").read_text().split() == ["20"]
    assert jobs.ids() == [*(f"id-{index}" for index in range(20)), "new"]
    assert jobs.run(path) == 0, "and again, by its new bytes"


def test_a_changed_request_is_refused(jobs: Jobs) -> None:
    path = write_batch(jobs.folder / "in.jsonl", 4)
    assert jobs.run(path) == 0
    rewritten(path, lambda row: json.dumps({**row, "body": {**row["body"], "max_tokens": 9}}))
    assert jobs.run(path) == 2


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21", None),
        ("/openai/v1/responses", "/v1/responses"),
        ("/v1/score", "/v1/score"),
        ("/v1/rerank", "/v1/rerank"),
    ],
)
def test_endpoints_by_other_names(
    url: str, known: str | None, check: Check, tmp_path: Path
) -> None:
    row = {"custom_id": "a", "method": "POST", "url": url, "body": {"input": "x"}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    found = check(str(tmp_path / "in.jsonl"), "--", "--runner", "any", code=0)
    assert found["urls"] == {known or "/v1/chat/completions": 1}


def test_results_may_be_read_by_whom_the_umask_says(jobs: Jobs) -> None:
    before = os.umask(0o027)
    try:
        assert jobs.run("f02_part1.jsonl") == 0
    finally:
        os.umask(before)
    assert jobs.output.stat().st_mode & 0o777 == 0o640
    assert journal_folder(jobs.output).stat().st_mode & 0o777 == 0o700


def test_a_batch_inside_a_running_loop(jobs: Jobs) -> None:
    async def cell() -> JobReport:
        path = CASES / "f02_part1.jsonl"
        return elbowroom.run_batch(str(jobs.model), str(path), str(jobs.output), memory="64MiB")

    assert asyncio.run(cell()).num_succeeded == 1


def test_what_the_package_offers() -> None:
    assert {"run_batch", "Pipeline", "__version__"} <= set(dir(elbowroom))
    assert elbowroom.__version__[0].isdigit()
