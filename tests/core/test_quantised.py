"""Tensors that follow from a ``quantization_config``: which are quantised, and how."""

from __future__ import annotations

from typing import Any

import pytest

from elbowroom.core.model_config import parse_config
from elbowroom.core.model_shapes import Stored
from elbowroom.core.model_weights import count_weights, quantised

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 32,
}
MATRIX = (128, 64)
ATTENTION, FFN = "model.layers.1.self_attn.q_proj.weight", "model.layers.11.mlp.gate_proj.weight"
VISION = "vision_tower.encoder.layers.0.mlp.fc1.weight"
FP8 = {"quant_method": "fp8"}


def packed(quantization: dict[str, Any], *names: str, shape: tuple[int, ...] = MATRIX) -> list[int]:
    """Bytes of tensors, 0 for those that are not quantised."""
    config = parse_config({**LLAMA, "quantization_config": quantization})
    tensors = {name: Stored(shape, None) for name in names}
    return [tensor.num_bytes for tensor in quantised(tensors, config).values()]


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_embeddings_routers_and_biases_are_not(name: str) -> None:
    assert packed(FP8, name) == [0]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    ],
)
def test_every_other_matrix_of_a_layer_is(name: str) -> None:
    assert packed(FP8, name) == [128 * 64]


def test_fused_experts_are() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    assert packed(FP8, name, shape=(4, 64, 128)) == [4 * 64 * 128]
    assert packed({"quant_method": "mxfp4"}, name, shape=(4, 64, 128)) == [4 * 64 * 128 * 17 // 32]
    assert packed({"quant_method": "mxfp4"}, FFN) == [0]


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        (["lm_head"], [1, 1, 1]),
        (["model.layers.1.self_attn.q_proj"], [0, 1, 1]),
        (["model.layers.1"], [0, 1, 1]),  # not of layer 11
        (["mlp.gate"], [1, 1, 1]),  # routers, and no gate_proj
        (["re:.*mlp.gate$"], [1, 1, 1]),
        (["re:.*self_attn.*"], [0, 1, 1]),
        (["re:^model\\.layers\\.1\\."], [0, 1, 1]),
        (["re:vision_tower.*", "re:.*lm_head"], [1, 1, 0]),
        (["vision_tower"], [1, 1, 0]),
        (["model.layers.*.self_attn"], [0, 1, 1]),
        (["*self_attn*", "*mlp*"], [0, 0, 0]),
        (["language_model.model.layers.1.self_attn.q_proj"], [0, 1, 1]),
        (None, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize(
    "key", ["modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules"]
)
def test_modules_that_are_left_out(key: str, left_out: list[str] | None, found: list[int]) -> None:
    sizes = packed({**FP8, key: left_out}, ATTENTION, FFN, VISION)
    assert [int(size > 0) for size in sizes] == found


def test_names_of_a_class_are_those_of_its_checkpoint() -> None:
    """Transformers puts the language model into the model; checkpoints have it the other way."""
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    module = "language_model.model.layers.1.self_attn.q_proj"
    assert packed({**FP8, "ignore": [module]}, name) == [0]


def test_an_expression_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"re:\*layers"):
        packed({**FP8, "ignore": ["re:*layers"]}, FFN)


def compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize(
    ("quantization", "bits_each"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, 8 + 32 / 64**2),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + (16 + 4) / 64),
        (compressed(num_bits=4, type="int", group_size=64, symmetric=True), 4 + 16 / 64),
        (compressed(num_bits=4, type="int", group_size=64, symmetric=False), 4 + (16 + 4) / 64),
        (compressed(num_bits=4, type="float", group_size=16, symmetric=True), 4 + 8 / 16),
        (compressed(num_bits=8, type="float", strategy="channel", group_size=None), 8),
    ],
)
def test_scales_and_zeros_count(quantization: dict[str, Any], bits_each: float) -> None:
    assert packed(quantization, FFN) == [int(128 * 64 * bits_each / 8)]


def test_layers_that_predict_further_tokens_are_not_counted() -> None:
    config = parse_config(LLAMA)
    names = (FFN, "mtp.layers.0.mlp.gate_proj.weight", "model.layers.12.mlp.up_proj.weight", VISION)
    counted = count_weights({name: Stored(MATRIX, None) for name in names}, config)
    assert sum(weights.elements for weights in counted.ffn) == 128 * 64
    assert counted.rest.elements == counted.outside == 128 * 64, "the vision tower"
