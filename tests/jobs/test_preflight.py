"""What is known before an engine starts: nothing is refused that vLLM would answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elbowroom.app.prepare import warnings_for
from elbowroom.core.errors import InputError
from elbowroom.jobs.job import JobOptions
from elbowroom.jobs.preflight import FileSummary, Warned
from elbowroom.jobs.rows import EMBEDDINGS
from elbowroom.jobs.scan import scanned
from tests.tiny_model import write_model

SERVED = ("mine", "/models/mine")


def summary(folder: Path, *bodies: dict[str, Any], url: str = "/v1/completions") -> FileSummary:
    path = folder / "in.jsonl"
    with path.open("w") as file:
        for index, body in enumerate(bodies):
            row = {"custom_id": str(index), "method": "POST", "url": url, "body": body}
            file.write(f"{json.dumps(row)}\n")
    with scanned(path, JobOptions(), SERVED) as rows:
        return rows.summary


def warned(folder: Path, found: FileSummary, *vllm_options: str, **config: Any) -> list[Warned]:
    write_model(folder / "model", **config)
    return list(warnings_for(found, folder / "model", SERVED, vllm_options))


def test_an_empty_name_is_served_by_any_model(tmp_path: Path) -> None:
    assert warned(tmp_path, summary(tmp_path, {"model": ""}, {"model": None}, {})) == []


@pytest.mark.parametrize("num_names", [3, 1500])
def test_rows_are_counted_however_many_names_there_are(tmp_path: Path, num_names: int) -> None:
    others = [{"model": f"m {index}"} for index in range(num_names)]
    with pytest.raises(InputError, match=f"{num_names} of {num_names} rows"):
        warned(tmp_path, summary(tmp_path, *others))
    (found,) = warned(tmp_path, summary(tmp_path, *others, {"model": "mine"}, {"model": "mine"}))
    assert found.num_rows == num_names
    assert "--served-model-name 'm 0'" in found.text, "as a shell takes it"


def test_rows_that_a_generating_engine_does_not_answer(tmp_path: Path) -> None:
    found = summary(tmp_path, {"input": "x"}, url=EMBEDDINGS)
    model = {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InputError, match="--runner pooling"):
        warned(tmp_path, found, **model)
    for options in (
        ["--runner", "pooling"],
        ["--hf_overrides={}"],
        ["--convert=embed"],
        ["--config", "options.yaml"],
    ):
        assert warned(tmp_path, found, *options, **model) == []
    two = ["NewModel", "LlamaForCausalLM"]
    assert warned(tmp_path, found, architectures=two) == [], "the first may decide"
    (tmp_path / "model" / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
    )
    assert warned(tmp_path, found, **model) == [], "vLLM pools by itself"


def test_names_that_options_of_vllm_give(tmp_path: Path) -> None:
    found = summary(tmp_path, {"model": "other"})
    for option in ("--lora-modules", "--served_model_name=other", "--config"):
        assert warned(tmp_path, found, option) == []
