"""Configs as models have them: every key by its own name, and what is derived from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elbowroom.core.errors import InputError
from elbowroom.core.model import read_model
from elbowroom.core.model_config import ModelConfig, parse_config, resolve_dtype
from tests.planning.facts import CONFIGS


def config(name: str) -> ModelConfig:
    return parse_config(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("name", "kv_bytes", "longest"),
    [
        ("falcon-7b", 8192, 2048),  # multi-query: one head
        ("falcon-40b", 122_880, 2048),  # num_kv_heads
        ("gpt2-xl", 307_200, 1024),  # n_head, n_positions
        ("starcoder", 20_480, 8192),  # multi_query of another type
        ("bloom-7b1", 491_520, 2048),  # no length at all
        ("phi-4", 204_800, 16_384),
        ("gemma-3-27b-it", 573_440, 131_072),  # 62 layers, padded to 7 groups of 10; not scaled
        ("deepseek-v3", 70_272, 163_840),  # one latent vector; its length is after scaling
        ("gpt-oss-120b", 73_728, 131_072),
        ("qwen2.5-7b-yarn", 57_344, 131_072),
        ("llama-linear-rope", 524_288, 16_384),
        ("llama-dynamic-rope", 524_288, 8192),
        ("qwen2.5-vl-7b", 57_344, 128_000),
    ],
)
def test_known_models(name: str, kv_bytes: int, longest: int) -> None:
    found = config(name)
    layers, groups = found.attention.groups()
    assert layers * len(groups) * found.attention.layer_elements() * 2 == kv_bytes
    assert found.max_model_len == longest


def test_latents_are_whole_on_every_device_and_heads_at_least_one() -> None:
    assert config("deepseek-v3").attention.layer_elements(8) == 512 + 64
    assert config("phi-4").attention.layer_elements(2) == 5 * 2 * 128
    assert config("glm-4-9b-0414").attention.layer_elements(8) == 2 * 128


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("gemma-2-27b", (4096, 0) * 23),
        ("gemma-3-27b-it", ((1024,) * 5 + (0,)) * 10 + (1024,) * 2),
        ("gpt-oss-120b", (128, 0) * 18),
        ("c4ai-command-r7b", (4096, 4096, 4096, 0) * 8),
        ("mistral-7b-v0.1", (4096,) * 32),
        ("qwen2.5-vl-7b", (0,) * 28),  # use_sliding_window is off
        ("llama-4-scout", (8192, 8192, 8192, 0) * 12),
    ],
)
def test_windows(name: str, windows: tuple[int, ...]) -> None:
    assert config(name).windows == windows


@pytest.mark.parametrize(
    "keys",
    [
        {"mamba_d_state": 16},
        {"layer_types": ["linear_attention", "full_attention"]},
        {"num_kv_shared_layers": 1},
    ],
)
def test_what_else_is_kept_is_not_known(keys: dict[str, Any]) -> None:
    found = parse_config({"model_type": "llama", "num_hidden_layers": 2, **keys})
    assert not found.attention.is_known


@pytest.mark.parametrize(
    ("name", "asked", "stored", "is_pooling", "dtype"),
    [
        ("phi-4", "auto", "bfloat16", False, "bfloat16"),
        ("gemma-2-27b", "auto", "float32", False, "bfloat16"),
        ("glm-4-9b-0414", "auto", "float16", False, "bfloat16"),  # numerically unstable
        ("glm-4-9b-0414", "float16", "float16", False, "float16"),  # vLLM says why not
        ("llama-no-dtype", "auto", "float16", False, "float16"),  # as the files are
        ("llama-no-dtype", "auto", "float32", False, "bfloat16"),
        ("llama-dynamic-rope", "auto", "float32", True, "float16"),
        ("gemma-2-27b", "auto", "float32", True, "bfloat16"),
        ("llama-dynamic-rope", "float32", "float32", False, "float32"),
    ],
)
def test_dtype(name: str, asked: str, stored: str, is_pooling: bool, dtype: str) -> None:
    assert resolve_dtype(config(name), stored, asked, is_pooling) == dtype


def test_values_of_the_class_stand_for_missing_keys_and_never_for_impossible_ones() -> None:
    found = parse_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}})
    assert (found.model_type, found.num_heads, found.head_dim) == ("gemma3_text", 8, 256)
    assert found.is_part
    with pytest.raises(InputError, match="'num_attention_heads' must be a positive integer"):
        parse_config({"model_type": "llama", "num_attention_heads": 0})


MISTRAL = {"model_type": "mistral", "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA4 = {"model_type": "llama4_text"}


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": None}, (0,) * 4),  # named, and none: later Mistrals
        ({}, (4096,) * 4),  # what the class takes
        ({"sliding_window": -1000}, (0,) * 4),
        ({"model_type": "afmoe", "sliding_window": 64}, (64, 64, 64, 0)),
        ({"model_type": "jamba"}, None),
        (LLAMA4, (8192, 8192, 8192, 0)),  # chunks, and every fourth layer none
        ({**LLAMA4, "no_rope_layers": []}, (8192, 8192, 8192, 0)),
        ({**LLAMA4, "no_rope_layers": [0, 1, 1, 0], "attention_chunk_size": 64}, (0, 64, 64, 0)),
        ({**LLAMA4, "attention_chunk_size": None}, (0,) * 4),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, None),  # vLLM keeps whole heads
    ],
)
def test_windows_of_few_keys(keys: dict[str, Any], windows: tuple[int, ...] | None) -> None:
    assert parse_config({**MISTRAL, "hidden_size": 64, "vocab_size": 9, **keys}).windows == windows


def test_heads_that_are_null_are_those_of_queries() -> None:
    keys = {**MISTRAL, "model_type": "qwen2", "num_key_value_heads": None}
    assert parse_config(keys).num_kv_heads == 8


@pytest.mark.parametrize(
    ("dtype", "found"),
    [("half", "float16"), ("float8_e4m3fn", "bfloat16"), ("float64", "bfloat16")],
)
def test_dtypes_by_other_names(dtype: str, found: str) -> None:
    assert resolve_dtype(parse_config({**MISTRAL, "dtype": dtype}), "float32", "auto") == found


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": 10**30},
        {"rope_scaling": {"type": "linear", "factor": -3}},
        {"rope_scaling": {"type": "linear", "factor": [1]}},
        {"architectures": 5},
        {"layer_types": [[1]] * 4},
        {"model_type": "deepseek_v3", "kv_lora_rank": "x"},
        {"quantization_config": {"bits": -4}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}},
        {"quantization_config": {"quant_method": "fp8", "ignore": ["re:*layers"]}},
        {"model_type": "llama4_text", "no_rope_layers": [1]},
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    config = {**MISTRAL, "hidden_size": 64, "intermediate_size": 9, "vocab_size": 9, **keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json"):
        read_model(tmp_path)
