"""Quantised weights in a pool, by a method that vLLM does not have: carried, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from elbowroom.planning.pool.shares import plan_shares
from tests.equivalence.random_models import edit_config, write_random_model
from tests.equivalence.ranks import ffn_bytes, pooled_case, run_ranks

pytestmark = pytest.mark.vllm

LAYOUTS = ("mapped", "streamed")
LIKE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def test_weights_that_a_method_changes_are_carried_or_refused(tmp_path: Path) -> None:
    """Linear and mixture, and one whose weights are hidden: seven starts in each of two ranks."""
    linear = _make(tmp_path / "linear", "llama", hides=False)
    mixture = _make(tmp_path / "mixture", "mixtral", hides=False, **MIXTURE)
    hiding = _make(tmp_path / "hiding", "llama", hides=True)
    cases: list[list[dict[str, Any]]] = [[], []]
    for path in (linear, mixture):
        for rank in cases:
            rank.append({"model_dir": str(path)})
        _add_pooled(cases, path, LAYOUTS)
    _add_pooled(cases, hiding, ("mapped",))
    cases[0][-1]["may_fail"] = cases[1][-1]["may_fail"] = True
    for rank in cases:
        for case in rank:
            case["import"] = "tests.equivalence.toy"
    for *answers, refused in run_ranks(cases, tmp_path):
        for plain, *pooled in (answers[:3], answers[3:]):
            assert len({json.dumps(row) for row in plain.rows}) == len(plain.rows), "all differ"
            for mode, answer in zip(LAYOUTS, pooled, strict=True):
                assert answer.rows == plain.rows, mode
        built = 3 * 128 * 256 * 2
        assert f"had {built} bytes of weights, of which 0 are left" in (refused.error or "")


def _add_pooled(cases: list[list[dict[str, Any]]], path: Path, modes: tuple[Any, ...]) -> None:
    for mode in modes:
        for rank, share in zip(cases, plan_shares(ffn_bytes(path), 2, mode, 1), strict=True):
            rank.append(pooled_case(path, share))


def _make(folder: Path, kind: str, hides: bool, **keys: Any) -> Path:
    write_random_model(folder, AutoConfig.for_model(kind, **LIKE, **keys))
    edit_config(folder, quantization_config={"quant_method": "toy", "hides": hides})
    return folder
