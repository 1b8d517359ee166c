"""Mixtures of experts in a pool give plain vLLM's tokens and log-probabilities, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from elbowroom.planning.pool.shares import plan_shares
from tests.equivalence.random_models import write_random_model
from tests.equivalence.ranks import ffn_bytes, pooled_case, run_ranks

pytestmark = pytest.mark.vllm

VOCABULARY = 256
LIKE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,  # divisible by neither 2 nor 3
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
SMALL_EXPERTS = {"moe_intermediate_size": 128}
DEEPSEEK = {
    **SMALL_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,  # with the next, the one size that MLA has on a CPU
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "topk_group": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**SMALL_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**SMALL_EXPERTS, "num_experts": 4, "head_dim": 32},
    "olmoe": {"num_experts": 4},
    "deepseek_v2": {**DEEPSEEK, "n_group": 1, "q_lora_rank": None},
    "deepseek_v3": {
        **DEEPSEEK,
        "n_group": 2,
        "q_lora_rank": 64,
        "topk_method": "noaux_tc",  # as published configs say, and classes do not
        "scoring_func": "sigmoid",
    },
}
LAYOUTS = ("mapped", "streamed")


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "kind",
    [
        # On each push one with shared experts: three starts of engines in each of two processes.
        pytest.param(kind, marks=[] if kind == "qwen2_moe" else pytest.mark.nightly)
        for kind in KINDS
    ],
)
def test_pooled_equals_plain(kind: str, num_ranks: int, tmp_path: Path) -> None:
    path = _make(tmp_path / "model", kind)
    cases: list[list[dict[str, Any]]] = [[{"model_dir": str(path)}] for _ in range(num_ranks)]
    for mode in LAYOUTS:
        for rank, share in enumerate(plan_shares(ffn_bytes(path), num_ranks, mode, 1)):
            cases[rank].append(pooled_case(path, share))
    for plain, *pooled in run_ranks(cases, tmp_path):
        assert len({json.dumps(answer) for answer in plain}) == len(plain), "all of them differ"
        for mode, answers in zip(LAYOUTS, pooled, strict=True):
            assert answers == plain, mode


def _make(folder: Path, kind: str) -> Path:
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **{**LIKE, **KINDS[kind]},
    )
    return write_random_model(folder, config)
