"""Inputs from public bug reports of batch jobs: each with the right value, and nothing lost.

``tests/data/batch`` has them; replicas are stubs that answer with the prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elbowroom
from elbowroom.cli.main import main
from elbowroom.core.errors import InputError
from elbowroom.jobs.identity import job_identity
from elbowroom.jobs.report import JobReport
from elbowroom.plans.pool import EngineOptions
from tests.app.stub_command import CASES, ROOT, Jobs
from tests.jobs.plans import write_batch
from tests.tiny_model import write_model

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
    other = ("--", "--served-model-name", "gpt-4o-mini")
    assert check(name, *other, code=0)["warnings"] == []
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


def test_an_id_goes_to_the_line_that_can_be_answered(jobs: Jobs) -> None:
    good = json.dumps(
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    )
    (jobs.folder / "in.jsonl").write_text(f'{{"custom_id": "a", "x": NaN}}\n{good}\n')
    assert jobs.run(jobs.folder / "in.jsonl") == 3
    assert jobs.ids() == ["a"]
    assert jobs.ids("out.errors.jsonl") == ["line-1"]


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


def test_a_batch_inside_a_running_loop(jobs: Jobs) -> None:
    async def cell() -> JobReport:
        path = CASES / "f02_part1.jsonl"
        return elbowroom.run_batch(str(jobs.model), str(path), str(jobs.output), memory="64MiB")

    assert asyncio.run(cell()).num_succeeded == 1


def test_what_the_package_offers() -> None:
    assert {"run_batch", "Pipeline", "__version__"} <= set(dir(elbowroom))
    assert elbowroom.__version__[0].isdigit()
