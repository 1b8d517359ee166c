"""Tensors of an architecture whose config alone is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from elbowroom.app.architecture import built_tensors
from elbowroom.core.errors import InputError
from elbowroom.core.model import ModelFacts, read_model
from tests.planning.facts import CONFIGS


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("llama-3.1-70b-fp8", 72.7),
        ("llama-3.1-70b-awq", 39.8),
        ("phi-4", 29.32),
        ("gemma-2-27b", 54.45),
        ("falcon-40b", 83.7),
        ("qwen2.5-vl-7b", 16.6),
    ],
)
def test_bytes_are_those_of_the_files(name: str, gigabytes: float, tmp_path: Path) -> None:
    facts = _facts(name, tmp_path)
    num_bytes = sum(facts.ffn_bytes()) + facts.replicated_bytes()
    assert num_bytes / 1e9 == pytest.approx(gigabytes, rel=0.015)


def test_what_is_quantised_is_the_matrices_of_layers(tmp_path: Path) -> None:
    facts = _facts("llama-3.1-70b-fp8", tmp_path)
    assert facts.rest.elements - facts.rest.packed == 2 * 128_256 * 8192 + (2 * 80 + 1) * 8192
    assert facts.uses_fp8()
    facts = _facts("gpt-oss-120b", tmp_path)
    assert facts.rest.packed == 0, "attention is not"
    assert not facts.uses_fp8(), "four bits are unpacked to sixteen"


def test_a_config_that_nothing_is_known_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "novel", "num_hidden_layers": 2, "num_attention_heads": 2, '
        '"hidden_size": 8, "vocab_size": 16}'
    )
    with pytest.raises(InputError, match="cannot build its architecture"):
        read_model(tmp_path, build=built_tensors)
    with pytest.raises(InputError, match="is not known without transformers"):
        read_model(tmp_path)


def _facts(name: str, folder: Path) -> ModelFacts:
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return read_model(folder, build=built_tensors)
